"""What tests of benchmarks share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def eager_in_place_of_compile() -> Iterator[None]:
    """Compiling takes ten seconds; what is compiled is the same function."""
    with torch.compiler.set_stance("force_eager"):
        yield
