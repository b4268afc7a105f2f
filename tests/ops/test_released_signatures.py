"""Our calls of other projects' functions, which tests cannot run without a GPU, bound against the signatures of their
releases: released_signatures.json, which tests/support/released_signatures.py records."""

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import erd_fast

PACKAGE = Path(erd_fast.__file__).parent
RECORDS = json.loads(Path(__file__).with_name("released_signatures.json").read_text())
NAMES = {record["name"] for record in RECORDS}
STARRED = {"heads.unbind(2)": 3}  # (N, T, 3, H, K)
HANDED_ON = {"FusedAdam": "make"}  # passed as an argument, called by the name of the parameter


class Site(NamedTuple):
    """A call in our source, and the function that it is in."""

    where: str
    call: ast.Call
    function: ast.FunctionDef


def released(record: dict[str, Any]) -> inspect.Signature:
    namespace: dict[str, Any] = {}
    exec(f"def function{record['signature']}: ...", namespace)
    return inspect.signature(namespace["function"])


def sites(name: str) -> list[Site]:
    """Our calls of ``name``, as an attribute of its module or by another name that we give it."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        if name not in text:
            continue
        for part in ast.parse(text).body:  # a variable of one is not that of another
            called = {name, HANDED_ON.get(name, name), *_aliases(part, name)}
            for function in (node for node in ast.walk(part) if isinstance(node, ast.FunctionDef)):
                calls = [node for node in _own(function) if isinstance(node, ast.Call)]
                where = path.relative_to(PACKAGE)
                found += [
                    Site(f"{where}:{call.lineno}", call, function) for call in calls if _name_of(call.func) in called
                ]
    return found


def _own(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function that are in no function within it."""
    waiting = [*function.body]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.FunctionDef):
            yield node
            waiting += ast.iter_child_nodes(node)


def _name_of(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute) and function.attr == "apply":  # of an autograd.Function
        return _name_of(function.value)
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _aliases(tree: ast.stmt, name: str) -> set[str]:
    """Variables that are assigned ``....name``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            pairs = zip(target.elts, value.elts, strict=False) if _both_tuples(target, value) else [(target, value)]
            found |= {
                to.id
                for to, given in pairs
                if isinstance(to, ast.Name) and isinstance(given, ast.Attribute) and given.attr == name
            }
    return found


def _both_tuples(target: ast.expr, value: ast.expr) -> bool:
    return isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)


def bind(call: ast.Call, signature: inspect.Signature) -> None:
    """Raises TypeError where Python would."""
    positional: list[ast.expr] = []
    for argument in call.args:
        starred = isinstance(argument, ast.Starred)
        positional += [argument] * (STARRED[ast.unparse(argument.value)] if starred else 1)
    assert all(keyword.arg for keyword in call.keywords), "**keywords cannot be bound"
    signature.bind(*positional, **{str(keyword.arg): keyword.value for keyword in call.keywords})


def handled(site: Site) -> set[str]:
    """What of "tensor" and "tuple" the code after the call takes as its result."""
    results, parents = set(), {}
    for node in ast.walk(site.function):
        for child in ast.iter_child_nodes(node):
            parents[child] = node
    parent = parents[site.call]
    if isinstance(parent, ast.Subscript) or (
        isinstance(parent, ast.Assign) and isinstance(parent.targets[0], ast.Tuple)
    ):
        return {"tuple"}
    if isinstance(parent, ast.Assign):
        results = {target.id for target in parent.targets if isinstance(target, ast.Name)}
    text = ast.unparse(site.function)
    if any(f"isinstance({name}, tuple)" in text for name in results):
        return {"tensor", "tuple"}
    return {"tuple"} if any(f"{name}[0]" in text for name in results) else {"tensor"}


@pytest.mark.parametrize("record", RECORDS, ids=lambda of: f"{of['module']}.{of['name']} {of['version'][:12]}")
def test_our_calls_fit_the_released_signature(record):
    assert any(record["module"] in path.read_text() for path in PACKAGE.rglob("*.py"))
    found = sites(record["name"])
    assert found, f"erd_fast calls {record['name']} nowhere"
    for site in found:
        try:
            bind(site.call, released(record))
        except TypeError as error:
            pytest.fail(f"{site.where}: {ast.unparse(site.call)}: {error}; released: {record['signature']}")
        if "returns" in record:
            assert record["returns"] in handled(site), f"{site.where}: the result is a {record['returns']}"


def _site(text: str) -> Site:
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    return Site("", next(node for node in ast.walk(function) if isinstance(node, ast.Call)), function)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("f(q, k, v, packed=True)", "unexpected keyword argument 'packed'"),
        ("f(deterministic=True)", "missing a required argument: 'qkv'"),
        ("f(*heads.unbind(2), 1)", "too many positional arguments"),
        ("f(qkv, qkv=q)", "multiple values for argument 'qkv'"),
    ],
)
def test_a_call_that_does_not_fit_is_found(call, message):
    record = {"signature": "(qkv, softmax_scale=None, deterministic=False)"}
    with pytest.raises(TypeError, match=message):
        bind(_site(f"def g():\n return {call}").call, released(record))


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        ("return f(q)", {"tensor"}),
        ("return f(q)[0]", {"tuple"}),
        ("out, lse = f(q)\n return out", {"tuple"}),
        ("out = f(q)\n return out[0]", {"tuple"}),
        ("out = f(q)\n return out[0] if isinstance(out, tuple) else out", {"tensor", "tuple"}),
    ],
)
def test_the_kind_of_result_that_a_call_takes_is_read(body, kinds):
    assert handled(_site(f"def g(q):\n {body}")) == kinds
