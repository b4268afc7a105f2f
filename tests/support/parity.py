"""The rule that backends are held by: docs/design.md, "Tests".

Truth is the definition in float64 on inputs rounded to their dtypes. What is held may err twice as much as plain
PyTorch in the same dtypes, by the worst of three seeds, and one unit in the last place of the output's dtype at the
largest true value. Errors are the largest one and the root mean square, each relative to the truth's.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SEEDS = 3
Tensors = Sequence[Tensor | None]


def errors(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """(max |error| / max |truth|, RMS ratio)."""
    error, truth = found.double() - truth, truth.double()
    largest = float(truth.abs().max()) or 1.0
    mean_square = float(truth.square().mean()) or 1.0
    return float(error.abs().max()) / largest, (float(error.square().mean()) / mean_square) ** 0.5


def hold(
    held: Callable[..., Tensors],
    plain: Callable[..., Tensors],
    inputs: Callable[[int], Tensors],
    names: Sequence[str],
    seeds: int = SEEDS,
) -> None:
    """Run ``held`` and ``plain`` (PyTorch in the dtypes of the inputs) on the inputs of each seed, and compare both
    with ``plain`` in float64. Integers and None stay as they are. What is slow is held on the first ``seeds``."""
    found, allowed = [], {name: [0.0, 0.0] for name in names}
    for seed in range(SEEDS):
        given = inputs(seed)
        truths = plain(*(_wide(value) for value in given))
        for name, value, truth in zip(names, plain(*given), truths, strict=True):
            if value is not None and truth is not None:
                allowed[name] = [max(pair) for pair in zip(allowed[name], errors(value, truth), strict=True)]
        if seed < seeds:
            found.append((held(*given), truths))
    for seed, (values, truths) in enumerate(found):
        for name, value, truth in zip(names, values, truths, strict=True):
            assert (value is None) == (truth is None), name
            if value is None or truth is None:
                continue
            _hold_one(f"{name}, seed {seed}", value, truth, allowed[name])


def no_worse(found: Tensors, plain: Tensors, truths: Tensors) -> None:
    """The rule on results that are there already: of one seed, so stricter."""
    for number, (value, other, truth) in enumerate(zip(found, plain, truths, strict=True)):
        assert (value is None) == (truth is None), number
        if value is not None and other is not None and truth is not None:
            _hold_one(str(number), value.detach(), truth.detach(), errors(other.detach(), truth.detach()))


def _hold_one(what: str, value: Tensor, truth: Tensor, limits: Sequence[float]) -> None:
    assert value.shape == truth.shape, f"{what}: {tuple(value.shape)}, not {tuple(truth.shape)}"
    assert value.isfinite().all(), f"{what}: not finite"
    unit = torch.finfo(value.dtype).eps
    for kind, error, limit in zip(("largest", "RMS"), errors(value, truth), limits, strict=True):
        assert error <= 2 * limit + unit, f"{what}: {kind} error {error:.3g}, PyTorch {limit:.3g}"


def _wide(value: Tensor | None) -> Tensor | None:
    if value is None or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def gradients(call: Callable[..., Tensors], given: Tensors, douts: Tensors) -> list[Tensor | None]:
    """The outputs of ``call(*given)`` and the gradients of those of ``given`` that require one."""
    outputs = list(call(*given))
    leaves = [value for value in given if value is not None and value.requires_grad]
    used = [(out, dout) for out, dout in zip(outputs, douts, strict=True) if out is not None and dout is not None]
    grads = torch.autograd.grad([out for out, _ in used], leaves, [dout.to(out.dtype) for out, dout in used])
    return [*(None if out is None else out.detach() for out in outputs), *grads]
