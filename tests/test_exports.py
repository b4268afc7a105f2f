"""Names of the package itself: they load at first use, and type checkers and dir() see them."""

import ast
from pathlib import Path

import erd_fast
from erd_fast import diffusion, ops


def test_exports_are_the_functions_of_their_modules():
    of_ops = {"autotune", "explain", "record", "use_backend"}
    assert erd_fast.__all__ == ["__version__", *erd_fast._EXPORTS]
    assert set(erd_fast._EXPORTS) == of_ops | {"get_schedule", "loss_weight", "weight_table"}
    for name in erd_fast._EXPORTS:
        assert getattr(erd_fast, name) is getattr(ops if name in of_ops else diffusion, name)
    assert set(erd_fast.__all__) <= set(dir(erd_fast))


def test_type_checkers_see_the_exports():
    tree = ast.parse(Path(erd_fast.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert imported == erd_fast._EXPORTS
