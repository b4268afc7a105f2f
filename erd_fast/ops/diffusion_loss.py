"""diffusion_loss: the weighted mean squared error of a batch, its parts, and its gradient, in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from erd_fast.ops.checks import check_device, check_dtype, check_finite, check_rows, check_shape
from erd_fast.ops.core.backend import Extension, Triton
from erd_fast.ops.core.op import Op, Pass, reference_needed
from erd_fast.ops.patchify import check_patch, patch_shape, patchify, unpatchify

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class DiffusionLoss(NamedTuple):
    """Loss of one batch. Only ``loss`` carries a gradient."""

    loss: Tensor  # () float32: mean over the batch of w(t_b) * mse_b
    per_sample: Tensor  # (N,) float32: mse_b, not weighted, so that weightings can be compared
    bin_sum: Tensor  # (num_bins,) float32: sum of mse_b over the samples of a timestep bin
    bin_count: Tensor  # (num_bins,) float32: number of samples in the bin
    dprediction: Tensor | None = None  # dL/dprediction * loss_scale, shape and dtype of the prediction, if computed


def diffusion_loss(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor,
    t_index: Tensor | None = None,
    *,
    num_bins: int = 10,
    batch_size: int | None = None,
    patch: int = 0,
    compute_grad: bool | None = None,
    loss_scale: Tensor | None = None,
) -> DiffusionLoss:
    """L = 1/B sum_b w(t_b) * mean_CHW (prediction - target)^2 in float32 (ERD paper Eq. 1; docs/math.md B4).

    Its gradient is dL/dprediction = 2 w(t_b) (prediction - target) / (B C H W), computed in the same pass and kept for
    backward, which multiplies it by that of ``loss``. A training loop may skip autograd: call it with the detached
    prediction and ``compute_grad=True``, then ``prediction.backward(result.dprediction)``.

    Args:
        prediction: (N, C', H, W), C' >= C, float32, bfloat16 or float16; channels beyond C (a learned variance) count
            for nothing. With ``patch``, tokens (N, H W / p^2, p^2 C') in the layout of :mod:`erd_fast.ops.patchify`.
        target: (N, C, H, W) float32.
        weight: float32, (K,) by timestep, or (N,) by sample if ``t_index`` is None.
        t_index: (N,) integer rows of ``weight``.
        num_bins: timestep bins, bin = t_index * num_bins // K; all empty if ``t_index`` is None.
        batch_size: B, images the mean runs over (the global batch of a micro-batch); None is N.
        patch: p of patch tokens; 0 is the image layout.
        compute_grad: True gives ``dprediction``; False, for evaluation, a loss without gradient; None leaves it to
            autograd.
        loss_scale: () float32 on the device, factor of ``dprediction`` alone; None is 1. With it the gradient is not
            for autograd, so ``prediction`` must be detached.

    Raises:
        ValueError: shapes, dtypes or devices do not go together, an argument is outside its range, or a weight is not
            finite. (On a GPU, rows and weights are not read back.)

    Moves, a sample of E = C H W elements: E * (size of prediction + 4) in, and E * size of prediction out for the
    gradient.
    """
    _check_images(prediction, target, patch)
    _check_weights(prediction, target, weight, t_index)
    for name, number in {"num_bins": num_bins, "batch_size": batch_size}.items():
        if number is not None and number < 1:
            raise ValueError(f"diffusion_loss: {name}: given {number}, allowed 1 or more")
    if compute_grad is False:
        prediction = prediction.detach()
    for_autograd = prediction.requires_grad and torch.is_grad_enabled()
    _check_scale(prediction, loss_scale, for_autograd)
    if for_autograd and compute_grad is None and prediction.dtype == torch.float16:
        loss_scale = _kept_scale(batch_size or target.shape[0], target)
    batch_size = batch_size or target.shape[0]
    t_index = None if t_index is None else t_index.long().contiguous()
    prediction, target, weight = prediction.contiguous(), target.contiguous(), weight.contiguous()
    if reference_needed(target, weight):
        if compute_grad:
            raise ValueError(
                "diffusion_loss: compute_grad: given True within a transform, or with a target or weight that "
                "requires a gradient; allowed None, with autograd"
            )
        return diffusion_loss_reference(
            prediction, target, weight, t_index, num_bins=num_bins, batch_size=batch_size, patch=patch
        )
    found = _op(
        prediction=prediction,
        target=target,
        weight=weight,
        t_index=t_index,
        num_bins=num_bins,
        batch_size=batch_size,
        patch=patch,
        compute_grad=bool(compute_grad or for_autograd),
        loss_scale=loss_scale,
    )
    return found if compute_grad else found._replace(dprediction=None)


def diffusion_loss_reference(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor,
    t_index: Tensor | None,
    *,
    num_bins: int,
    batch_size: int | None,
    patch: int = 0,
) -> DiffusionLoss:
    """The definition of :func:`diffusion_loss`; autograd of its ``loss`` defines the gradient."""
    images = unpatchify(prediction, patch, *target.shape[2:])
    error = images[:, : target.shape[1]].float() - target
    mse = error.square().flatten(1).mean(1)
    weight_t = weight if t_index is None else weight[t_index]
    loss = (weight_t * mse).sum() / (batch_size or mse.shape[0])

    per_sample = mse.detach()
    bin_sum = torch.zeros(num_bins, device=mse.device)
    bin_count = torch.zeros(num_bins, device=mse.device)
    if t_index is not None:
        bins = t_index.long() * num_bins // weight.shape[0]
        bin_sum = bin_sum.index_add(0, bins, per_sample)
        bin_count = bin_count.index_add(0, bins, torch.ones_like(per_sample))
    return DiffusionLoss(loss, per_sample, bin_sum, bin_count)


def _check_images(prediction: Tensor, target: Tensor, patch: int) -> None:
    check_dtype("diffusion_loss", "prediction", prediction, *_FLOATS)
    check_dtype("diffusion_loss", "target", target, torch.float32)
    if target.dim() != 4 or not target.numel():
        raise ValueError(
            f"diffusion_loss: target: given {tuple(target.shape)}, allowed (N, C, H, W) with N of 1 or more"
        )
    n, c, h, w = target.shape
    check_patch("diffusion_loss", patch, h, w)
    if patch:
        tokens, features = patch_shape((n, c, h, w), patch)[1:]
        fits = prediction.dim() == 3 and prediction.shape[:2] == (n, tokens) and prediction.shape[2] >= features
        fits = fits and prediction.shape[2] % (patch * patch) == 0
        allowed = f"({n}, {tokens}, {patch * patch} C') with C' >= {c}"
    else:
        fits = prediction.dim() == 4 and prediction.shape[1] >= c
        fits = fits and (prediction.shape[0], *prediction.shape[2:]) == (n, h, w)
        allowed = "(N, C', H, W) and (N, C, H, W) with C' >= C"
    if not fits:
        raise ValueError(
            f"diffusion_loss: prediction {tuple(prediction.shape)} and target {tuple(target.shape)}: allowed {allowed}"
        )


def _check_weights(prediction: Tensor, target: Tensor, weight: Tensor, t_index: Tensor | None) -> None:
    rows = (weight if t_index is None else t_index).shape[0]
    if weight.dim() != 1 or rows != target.shape[0]:
        raise ValueError(
            f"diffusion_loss: weight {tuple(weight.shape)} and t_index "
            f"{None if t_index is None else tuple(t_index.shape)}: allowed (K,) and (N,), or (N,) and None"
        )
    check_shape("diffusion_loss", "t_index", t_index, (target.shape[0],))
    check_dtype("diffusion_loss", "t_index", t_index, torch.int64, torch.int32)
    check_dtype("diffusion_loss", "weight", weight, torch.float32)
    check_device("diffusion_loss", prediction=prediction, target=target, weight=weight, t_index=t_index)
    check_rows("diffusion_loss", "t_index", t_index, weight.shape[0])
    check_finite("diffusion_loss", "weight", weight)


def _kept_scale(batch_size: int, target: Tensor) -> Tensor:
    """The scale at which a float16 gradient is kept for backward, a power of two near B C H W: elements of 2 w error /
    (B C H W) would be subnormal, and the factor of a gradient scaler comes too late to save them."""
    elements = batch_size * target[0].numel()
    return torch.full((), 2.0 ** (elements.bit_length() - 1), device=target.device)


def _check_scale(prediction: Tensor, loss_scale: Tensor | None, for_autograd: bool) -> None:
    if loss_scale is None:
        return
    check_shape("diffusion_loss", "loss_scale", loss_scale, ())
    check_dtype("diffusion_loss", "loss_scale", loss_scale, torch.float32)
    check_device("diffusion_loss", prediction=prediction, loss_scale=loss_scale)
    if for_autograd:
        raise ValueError(
            "diffusion_loss: prediction: given one that requires a gradient, allowed a detached one with loss_scale"
        )


def _forward(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor,
    t_index: Tensor | None,
    num_bins: int,
    batch_size: int,
    patch: int,
    compute_grad: bool,
    loss_scale: Tensor | None,
) -> DiffusionLoss:
    result = diffusion_loss_reference(
        prediction, target, weight, t_index, num_bins=num_bins, batch_size=batch_size, patch=patch
    )
    if not compute_grad:
        return result._replace(dprediction=prediction.new_empty(0))
    _, channels, height, width = target.shape
    images = unpatchify(prediction, patch, height, width)
    factor = (weight if t_index is None else weight[t_index]) * (2.0 / (batch_size * channels * height * width))
    if loss_scale is not None:
        factor = factor * loss_scale
    gradient = torch.zeros(images.shape, dtype=prediction.dtype, device=prediction.device)
    gradient[:, :channels] = (images[:, :channels].float() - target) * factor[:, None, None, None]
    return result._replace(dprediction=patchify(gradient, patch).contiguous())


def _empty(prediction: Tensor, target: Tensor, num_bins: int, compute_grad: bool, **_: Any) -> DiffusionLoss:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=target.device)

    dprediction = torch.empty_like(prediction) if compute_grad else prediction.new_empty(0)
    return DiffusionLoss(empty(), empty(target.shape[0]), empty(num_bins), empty(num_bins), dprediction)


def _gradient(dloss: Tensor, dprediction: Tensor, loss_scale: Tensor | None, **_: Any) -> dict[str, Tensor]:
    return {"prediction": dprediction.float() * (dloss if loss_scale is None else dloss / loss_scale)}


_op = Op(
    "diffusion_loss",
    Pass(_forward, _empty),
    gradient=_gradient,
    backends=(Extension("cuda"), Triton(), Extension("cpu")),
)
