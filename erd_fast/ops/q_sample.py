"""q_sample: from stored latents to the noisy input and the regression target, in one pass."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from erd_fast.ops.arguments import check_shape
from erd_fast.random import Purpose, Stream, normals

LatentKind = Literal["sample", "mean_std", "mean_logvar", "pixels"]
"""What a store holds: ready samples; VAE mean and std; VAE mean and log-variance; uint8 pixels."""

_LOGVAR_RANGE = (-30.0, 20.0)  # the clamp of the LDM autoencoder


class QSample(NamedTuple):
    """Noisy input and target of one batch."""

    x_t: Tensor  # (N, C, H, W), model dtype
    target: Tensor  # (N, C, H, W) float32


def q_sample(
    latents: Tensor,
    coefficients: Tensor,
    t_index: Tensor | None = None,
    *,
    index: Tensor | None = None,
    kind: LatentKind = "sample",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    flip: Tensor | None = None,
    ids: Tensor | None = None,
    seed: int | None = None,
    purpose: Purpose = Purpose.TRAIN,
    noise: Tensor | None = None,
    posterior_noise: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> QSample:
    """x_t = alpha x0 + sigma eps and y = c_x x0 + c_eps eps (ERD paper, sections 2.1 and A; docs/math.md A, B).

    x0 comes from the stored row: ``sample`` z; ``mean_std`` z = mean + std n; ``mean_logvar`` z = mean +
    exp(clamp(logvar, -30, 20) / 2) n; ``pixels`` z = (2 p - 255) / 255 of uint8 p. Then x0 = (z - shift) * scale,
    mirrored along W where ``flip``. All arithmetic is float32; x_t is rounded once to ``dtype``.

    Args:
        latents: (M, C, H, W), or (M, 2C, H, W) for the two ``mean_*`` kinds; float32, bfloat16, float16; uint8 for
            pixels.
        coefficients: rows (alpha, sigma, c_x, c_eps), float32: (K, 4) by timestep, or (N, 4) by sample if
            ``t_index`` is None.
        t_index: (N,) integer rows of ``coefficients``.
        index: (N,) integer rows of ``latents`` (a resident data set); None takes all rows in order.
        scale, shift: (C,) float32; None is 1 and 0.
        flip: (N,) bool; None mirrors nothing.
        ids, seed, purpose: key of the drawn noise, needed where ``noise`` (or, for ``mean_*``, ``posterior_noise``)
            is None.
        noise, posterior_noise: (N, C, H, W) float32 standard normals in place of drawn ones.

    Returns:
        :class:`QSample`.

    Raises:
        ValueError: shape, dtype or kind is not allowed, or noise is neither given nor drawable.

    Moves, an image of E = C H W elements: the stored row once, E * (size of ``dtype`` + 4) out, and 4 E a given noise.
    """
    if kind not in get_args(LatentKind):
        raise ValueError(f"q_sample: kind: given {kind!r}, allowed {', '.join(get_args(LatentKind))}")
    if latents.dim() != 4:
        raise ValueError(f"q_sample: latents: given shape {tuple(latents.shape)}, allowed (M, C, H, W)")
    if (kind == "pixels") != (latents.dtype == torch.uint8):
        raise ValueError(f"q_sample: latents: given {latents.dtype} for kind {kind!r}; uint8 goes with pixels alone")
    if kind.startswith("mean_") and latents.shape[1] % 2:
        raise ValueError(f"q_sample: latents: given {latents.shape[1]} channels, allowed an even number for {kind!r}")
    count = (latents if index is None else index).shape[0]
    rows = coefficients.shape[0] if t_index is None else t_index.shape[0]
    if coefficients.dim() != 2 or coefficients.shape[1] != 4 or rows != count:
        raise ValueError(
            f"q_sample: coefficients {tuple(coefficients.shape)} and t_index "
            f"{None if t_index is None else tuple(t_index.shape)}: allowed (K, 4) and ({count},), "
            f"or ({count}, 4) and None"
        )
    draws = noise is None or (kind.startswith("mean_") and posterior_noise is None)
    if draws and (ids is None or seed is None):
        raise ValueError("q_sample: noise is not given, so ids and seed are needed to draw it")
    channels = latents.shape[1] // (2 if kind.startswith("mean_") else 1)
    for name, per_image in {"t_index": t_index, "index": index, "ids": ids, "flip": flip}.items():
        check_shape("q_sample", name, per_image, (count,))
    for name, per_channel in {"scale": scale, "shift": shift}.items():
        check_shape("q_sample", name, per_channel, (channels,))
    for name, normal in {"noise": noise, "posterior_noise": posterior_noise}.items():
        check_shape("q_sample", name, normal, (count, channels, *latents.shape[2:]))
    return q_sample_reference(
        latents,
        coefficients,
        t_index,
        index=index,
        kind=kind,
        scale=scale,
        shift=shift,
        flip=flip,
        ids=ids,
        seed=seed,
        purpose=purpose,
        noise=noise,
        posterior_noise=posterior_noise,
        dtype=dtype,
    )


def q_sample_reference(
    latents: Tensor,
    coefficients: Tensor,
    t_index: Tensor | None,
    *,
    index: Tensor | None,
    kind: LatentKind,
    scale: Tensor | None,
    shift: Tensor | None,
    flip: Tensor | None,
    ids: Tensor | None,
    seed: int | None,
    purpose: Purpose,
    noise: Tensor | None,
    posterior_noise: Tensor | None,
    dtype: torch.dtype,
) -> QSample:
    """The definition of :func:`q_sample`."""
    stored = latents if index is None else latents[index]
    channels = stored.shape[1] // (2 if kind.startswith("mean_") else 1)
    shape = (channels, *stored.shape[2:])

    def drawn(given: Tensor | None, stream: Stream) -> Tensor:
        if given is not None:
            return given.float()
        assert ids is not None and seed is not None
        return normals(seed, purpose, stream, ids, shape)

    if kind == "pixels":
        x_start = (2.0 * stored.float() - 255.0) / 255.0
    elif kind == "sample":
        x_start = stored.float()
    else:
        mean, spread = stored.float().chunk(2, dim=1)
        std = spread if kind == "mean_std" else torch.exp(0.5 * spread.clamp(*_LOGVAR_RANGE))
        x_start = mean + std * drawn(posterior_noise, Stream.POSTERIOR)
    if shift is not None:
        x_start = x_start - shift[:, None, None]
    if scale is not None:
        x_start = x_start * scale[:, None, None]
    if flip is not None:
        x_start = torch.where(flip[:, None, None, None], x_start.flip(-1), x_start)

    eps = drawn(noise, Stream.NOISE)
    rows = coefficients if t_index is None else coefficients[t_index]
    alpha, sigma, c_x, c_eps = rows.float()[:, :, None, None, None].unbind(1)
    return QSample(x_t=(alpha * x_start + sigma * eps).to(dtype), target=c_x * x_start + c_eps * eps)
