"""Importing small data sets, and seeing that what is refused leaves nothing."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erd_fast.data import LatentStore
from erd_fast.data.formats.source import ImportOptions
from erd_fast.data.importers import import_dataset
from erd_fast.errors import DataError, ErdFastError


@pytest.fixture
def imported(tmp_path) -> Callable[..., LatentStore]:
    """``imported(format, src, **options)``: the store, in fp32 unless told otherwise."""

    def run(name: str, src: Path, **options: Any) -> LatentStore:
        options = {"dtype": "float32"} | options if name != "celeba" else options
        return import_dataset(
            name, src, tmp_path / "out" / f"store-{len(list(tmp_path.glob('out/*')))}", ImportOptions(**options)
        )

    return run


@pytest.fixture
def refused(tmp_path) -> Callable[..., str]:
    """``refused(format, src, error=DataError, **options)``: the message; nothing may be left."""

    def run(name: str, src: Path, error: type[ErdFastError] = DataError, **options: Any) -> str:
        with pytest.raises(error) as caught:
            import_dataset(name, src, tmp_path / "refused" / "store", ImportOptions(**options))
        assert not (tmp_path / "refused").exists() or os.listdir(tmp_path / "refused") == []
        assert type(caught.value) is error and "\n" not in str(caught.value)
        return str(caught.value)

    return run
