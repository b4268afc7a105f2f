"""Files that others wrote: names and labels in them, and how what is wrong with them is told."""

import contextlib
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from erd_fast.errors import DataError

ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)
"""What damage in a zip file makes Python raise, beside the errors of all files."""
CLASSES = 2**31
"""Labels lie below it: shards have int32."""
DATASET_JSON = "dataset.json"


@contextlib.contextmanager
def reading(name: object, *errors: type[Exception]) -> Iterator[None]:
    """Turn OSError, and what else a library raises about damaged content, into a DataError about ``name``."""
    caught: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, *errors)
    try:
        yield
    except caught as error:
        raise DataError(f"{name} cannot be read: {error}") from error


def check_entries(source: object, names: Sequence[str]) -> None:
    """Raise DataError if an entry of an archive or a list has a name that is no place within it, or one that another
    entry has."""
    for name in names:
        _refuse_escape(source, name)
    if len(set(names)) < len(names):
        name, count = Counter(names).most_common(1)[0]
        raise DataError(f"{source} has {count} entries {name}, allowed one")


def _refuse_escape(source: object, name: str) -> None:
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or re.match(r"[A-Za-z]:", name):
        raise DataError(f"{source}: entry {name!r} leaves the folder, allowed paths within it")


def class_number(label: int, name: object) -> int:
    if not 0 <= label < CLASSES:
        raise DataError(f"{name}: given label {label}, allowed 0 to {CLASSES - 1}")
    return label


def labels_of_json(source: object, names: Sequence[str], content: bytes) -> list[int] | None:
    """The label of each of ``names`` by ``dataset.json``, as EDM2's tools write it: {"labels": [[name, class], ...]};
    null is no classes.

    Raises:
        DataError: it has another form, or names something else than ``names``.
    """
    where = f"{source}/{DATASET_JSON}"
    table = _table(where, content)
    if table is None:
        return None
    if missing := [name for name in names if name not in table]:
        raise DataError(f"{where} has no label for {missing[0]} (files like it: {len(missing):,})")
    if absent := sorted(table.keys() - set(names)):
        raise DataError(f"{where} names {absent[0]}, which is missing (files like it: {len(absent):,})")
    return [table[name] for name in names]


def _table(where: str, content: bytes) -> dict[str, int] | None:
    allowed = 'allowed {"labels": [[name, class], ...]} or null'
    try:
        found: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("labels", 0), list | None):
        raise DataError(f"{where}: given {str(found)[:60]}, {allowed}")
    pairs = found["labels"]
    if pairs is None:
        return None
    for pair in pairs:
        if not isinstance(pair, list) or [type(item) for item in pair] != [str, int]:
            raise DataError(f"{where}: given {str(pair)[:60]}, {allowed}")
    check_entries(where, [name for name, _ in pairs])
    return {name: class_number(label, where) for name, label in pairs}
