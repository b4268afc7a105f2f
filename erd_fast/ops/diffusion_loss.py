"""diffusion_loss: the weighted mean squared error of a batch, with its per-sample and per-timestep parts."""

from typing import NamedTuple

import torch
from torch import Tensor

from erd_fast.ops.arguments import check_shape


class DiffusionLoss(NamedTuple):
    """Loss of one batch. Only ``loss`` carries a gradient."""

    loss: Tensor  # () float32: mean over the batch of w(t_b) * mse_b
    per_sample: Tensor  # (N,) float32: mse_b, not weighted, so that weightings can be compared
    bin_sum: Tensor  # (num_bins,) float32: sum of mse_b over the samples of a timestep bin
    bin_count: Tensor  # (num_bins,) float32: number of samples in the bin


def diffusion_loss(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor,
    t_index: Tensor | None = None,
    *,
    num_bins: int = 10,
    batch_size: int | None = None,
) -> DiffusionLoss:
    """L = 1/B sum_b w(t_b) * mean_CHW (prediction - target)^2 in float32 (ERD paper Eq. 1; docs/math.md B4).

    Its gradient is dL/dprediction = 2 w(t_b) (prediction - target) / (B C H W).

    Args:
        prediction: (N, C', H, W), C' >= C, any float dtype; channels beyond C (a learned variance) count for nothing.
        target: (N, C, H, W) float32.
        weight: float32, (K,) by timestep, or (N,) by sample if ``t_index`` is None.
        t_index: (N,) integer rows of ``weight``.
        num_bins: timestep bins, bin = t_index * num_bins // K; all empty if ``t_index`` is None.
        batch_size: B, images the mean runs over (the global batch of a micro-batch); None is N.

    Raises:
        ValueError: shapes do not go together, or an argument is outside its range.

    Moves, a sample of E = C H W elements: E * (size of prediction + 4) in; the gradient is one more pass of the same
    size.
    """
    fits = prediction.dim() == target.dim() == 4 and prediction.shape[1] >= target.shape[1]
    if not fits or (prediction.shape[0], *prediction.shape[2:]) != (target.shape[0], *target.shape[2:]):
        raise ValueError(
            f"diffusion_loss: prediction {tuple(prediction.shape)} and target {tuple(target.shape)}: "
            "allowed (N, C', H, W) and (N, C, H, W) with C' >= C"
        )
    rows = weight.shape[0] if t_index is None else t_index.shape[0]
    if weight.dim() != 1 or rows != target.shape[0]:
        raise ValueError(
            f"diffusion_loss: weight {tuple(weight.shape)} and t_index "
            f"{None if t_index is None else tuple(t_index.shape)}: allowed (K,) and (N,), or (N,) and None"
        )
    check_shape("diffusion_loss", "t_index", t_index, (target.shape[0],))
    for name, number in {"num_bins": num_bins, "batch_size": batch_size}.items():
        if number is not None and number < 1:
            raise ValueError(f"diffusion_loss: {name}: given {number}, allowed 1 or more")
    return diffusion_loss_reference(prediction, target, weight, t_index, num_bins=num_bins, batch_size=batch_size)


def diffusion_loss_reference(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor,
    t_index: Tensor | None,
    *,
    num_bins: int,
    batch_size: int | None,
) -> DiffusionLoss:
    """The definition of :func:`diffusion_loss`; autograd of its ``loss`` defines the gradient."""
    error = prediction[:, : target.shape[1]].float() - target
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
