"""Images in Parquet files, as data sets on Hugging Face's hub have them."""

import bisect
import functools
import itertools
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from erd_fast.data.foreign import CLASSES
from erd_fast.data.pictures.pictures import Pictures
from erd_fast.errors import DataError
from erd_fast.extras import load

_GROUPS_KEPT = 2  # images are read in order, and threads may be in two row groups


class _Group(NamedTuple):
    """Rows that are read together."""

    path: Path
    number: int
    column: str
    rows: int
    bytes: int


def open_parquet(files: Sequence[Path]) -> Pictures:
    """Column ``image``, of bytes or of {bytes, path}, and column ``label``, of whole numbers; -1 is no label."""
    parquet = load("pyarrow.parquet", "formats", str(files[0]))
    arrow = load("pyarrow", "formats", str(files[0]))
    groups: list[_Group] = []
    labels: list[int] = []
    class_names: tuple[str, ...] = ()
    for path in files:
        try:
            with parquet.ParquetFile(path) as file:
                groups += _groups(path, arrow, file)
                labels += _labels(path, file)
                class_names = class_names or _class_names(file)
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    if not any(label >= 0 for label in labels):
        return _pictures(parquet, groups, None, ())
    if -1 in labels:
        raise DataError(f"{files[0]}: column label: given images with a label and without, allowed all or none")
    return _pictures(parquet, groups, labels, class_names)


def _pictures(parquet: Any, groups: list[_Group], labels: list[int] | None, class_names: tuple[str, ...]) -> Pictures:
    firsts = [0, *itertools.accumulate(group.rows for group in groups)]
    names = [
        f"{path.name}/{row}"
        for path, part in itertools.groupby(groups, lambda group: group.path)
        for row in range(sum(group.rows for group in part))
    ]
    sizes = [group.bytes for group in groups for _ in range(group.rows)]
    return Pictures(names, sizes, labels, class_names, _reader(parquet, groups, firsts))


def _reader(parquet: Any, groups: list[_Group], firsts: list[int]) -> Callable[[int], bytes]:
    lock = threading.Lock()

    @functools.lru_cache(_GROUPS_KEPT)
    def rows_of(which: int) -> Any:
        path, number, column, *_ = groups[which]
        with parquet.ParquetFile(path) as file:
            return file.read_row_group(number, columns=[column])["image"]

    def read(i: int) -> bytes:
        which = bisect.bisect_right(firsts, i) - 1
        with lock:  # one thread reads a row group, and the others wait for it
            rows = rows_of(which)
        row = rows[i - firsts[which]].as_py()
        content = row["bytes"] if isinstance(row, dict) else row
        if content is None:
            raise DataError("the row has no image")
        return content

    return read


def _groups(path: Path, arrow: Any, file: Any) -> list[_Group]:
    column = _image_column(path, arrow, file.schema_arrow)
    found = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    return [_Group(path, number, column, group.num_rows, group.total_byte_size) for number, group in enumerate(found)]


def _image_column(path: Path, arrow: Any, schema: Any) -> str:
    if "image" not in schema.names:
        raise DataError(f"{path}: given columns {', '.join(schema.names)}; allowed are those with one called image")
    kind = schema.field("image").type
    if arrow.types.is_struct(kind) and "bytes" in (kind.field(i).name for i in range(kind.num_fields)):
        return "image.bytes"
    if arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind):
        return "image"
    raise DataError(f"{path}: column image: given {kind}, allowed binary, or a struct with bytes")


def _labels(path: Path, file: Any) -> list[int]:
    """-1 where there is none."""
    if "label" not in file.schema_arrow.names:
        return [-1] * file.metadata.num_rows
    labels = file.read(columns=["label"])["label"].to_pylist()
    if wrong := [label for label in labels if type(label) is not int or not -1 <= label < CLASSES]:
        raise DataError(f"{path}: column label: given {wrong[0]!r}, allowed whole numbers, 0 or more, or -1 for none")
    return labels


def _class_names(file: Any) -> tuple[str, ...]:
    """Of the schema's metadata, which the library ``datasets`` writes."""
    try:
        described = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])
        return tuple(map(str, described["info"]["features"]["label"]["names"]))
    except (KeyError, ValueError, TypeError):
        return ()
