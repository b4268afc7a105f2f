"""Images in Parquet files, as data sets on Hugging Face's hub have them."""

import functools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from erd_fast.data.pictures.pictures import Pictures
from erd_fast.errors import DataError
from erd_fast.extras import load

_ROW_GROUPS_KEPT = 2  # rows are read in order, and threads may be in two of them


def open_parquet(files: Sequence[Path]) -> Pictures:
    """Column ``image``, of bytes or of {bytes, path}, and column ``label``, of whole numbers; -1 is no label."""
    parquet = load("pyarrow.parquet", "formats", str(files[0]))
    arrow = load("pyarrow", "formats", str(files[0]))
    try:
        opened = [parquet.ParquetFile(file) for file in files]
        labels = _labels(files, opened)
        class_names = _class_names(opened[0]) if labels else ()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{files[0]} cannot be read as Parquet: {error}") from error
    column = _image_column(files[0], arrow, opened[0])
    groups = [(file, group) for file in range(len(files)) for group in range(opened[file].num_row_groups)]
    ends = np.cumsum([opened[file].metadata.row_group(group).num_rows for file, group in groups])
    lock = threading.Lock()

    @functools.lru_cache(_ROW_GROUPS_KEPT)
    def rows(number: int) -> Any:
        file, group = groups[number]
        return opened[file].read_row_group(group, columns=[column])[column.split(".")[0]]

    def read(i: int) -> bytes:
        with lock:
            number = int(np.searchsorted(ends, i, side="right"))
            row = rows(number)[i - (int(ends[number - 1]) if number else 0)].as_py()
        content = row["bytes"] if isinstance(row, dict) else row
        if content is None:
            raise DataError("the row has no image")
        return content

    names = [
        f"{path.name}/{row}" for path, file in zip(files, opened, strict=True) for row in range(file.metadata.num_rows)
    ]
    return Pictures(names, [0] * len(names), labels, class_names, read)


def _image_column(path: Path, arrow: Any, file: Any) -> str:
    schema = file.schema_arrow
    if "image" not in schema.names:
        raise DataError(f"{path}: given columns {', '.join(schema.names)}; allowed are those with one called image")
    kind = schema.field("image").type
    if arrow.types.is_struct(kind) and "bytes" in (kind.field(i).name for i in range(kind.num_fields)):
        return "image.bytes"
    if arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind):
        return "image"
    raise DataError(f"{path}: column image: given {kind}, allowed binary, or a struct with bytes")


def _labels(paths: Sequence[Path], files: Sequence[Any]) -> list[int] | None:
    """None where there is no column, or nothing in it."""
    labels: list[int] = []
    for path, file in zip(paths, files, strict=True):
        if "label" not in file.schema_arrow.names:
            return None
        found = file.read(columns=["label"])["label"].to_pylist()
        if wrong := [label for label in found if type(label) is not int or label < -1]:
            raise DataError(
                f"{path}: column label: given {wrong[0]!r}, allowed whole numbers, 0 or more, or -1 for none"
            )
        labels += found
    if all(label == -1 for label in labels):
        return None
    if -1 in labels:
        raise DataError(f"{paths[0]}: column label: given -1, no label, beside labels; allowed all or none")
    return labels


def _class_names(file: Any) -> tuple[str, ...]:
    """Of the schema's metadata, which the library ``datasets`` writes."""
    try:
        described = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])
        return tuple(described["info"]["features"]["label"]["names"])
    except (KeyError, ValueError, TypeError):
        return ()
