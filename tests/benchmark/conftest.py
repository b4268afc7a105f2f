"""What tests of benchmarks share."""

from collections.abc import Callable

import pytest

from erd_fast.ops.core.op import Pass


@pytest.fixture
def make_wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``make_wrong(pass, 1.01, "dx")``: multiply outputs of the reference, all if none is named."""

    def patch(direction: Pass, factor: float, *fields: str) -> None:
        body = direction.body

        def wrong(**args):
            outputs = body(**args)
            return outputs._replace(**{name: factor * getattr(outputs, name) for name in fields or outputs._fields})

        monkeypatch.setattr(direction, "body", wrong)

    return patch
