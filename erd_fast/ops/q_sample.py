"""q_sample: from stored latents to the noisy input and the regression target, in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from erd_fast.latents import KINDS, LOGVAR_RANGE, LatentKind, has_posterior, latent_channels
from erd_fast.ops.checks import check_dtype, check_finite, check_rows, check_tensor
from erd_fast.ops.core.backend import Extension, Triton
from erd_fast.ops.core.op import Op, Pass, reference_needed
from erd_fast.ops.patchify import check_patch, patch_shape, patchify
from erd_fast.random import Purpose, Stream, normals, signed_seed, unsigned_seed

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_REALS = (*_FLOATS, torch.float64)
_ROWS = (torch.int64, torch.int32)


class QSample(NamedTuple):
    """Noisy input and target of one batch."""

    x_t: Tensor  # (N, C, H, W), or patch tokens (N, H W / p^2, p^2 C); model dtype
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
    patch: int = 0,
) -> QSample:
    """x_t = alpha x0 + sigma eps and y = c_x x0 + c_eps eps (ERD paper, sections 2.1 and A; docs/math.md A, B).

    x0 comes from the stored row: ``sample`` z; ``mean_std`` z = mean + std n; ``mean_logvar`` z = mean +
    exp(clamp(logvar, -30, 20) / 2) n; ``pixels`` z = (2 p - 255) / 255 of uint8 p. Then x0 = (z - shift) * scale,
    mirrored along W where ``flip``. All arithmetic is float32; x_t is rounded once to ``dtype``. Where a gradient is
    needed, or within a functorch transform, the differentiable reference runs.

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
        noise, posterior_noise: (N, C, H, W) standard normals in place of drawn ones.
        dtype: of x_t; float32, bfloat16 or float16.
        patch: p > 0 gives x_t as patch tokens (:mod:`erd_fast.ops.patchify`); it divides H and W.

    Returns:
        :class:`QSample`.

    Raises:
        ValueError: a shape, dtype, device or kind is not allowed, a row is out of range, a coefficient is not finite,
            or noise is neither given nor drawable. (On a GPU, rows and tables are not read back: an image of a row out
            of range becomes NaN.)

    Moves, an image of E = C H W elements: the stored row once, E * (size of ``dtype`` + 4) out, and 4 E a given noise.
    """
    with_posterior = has_posterior(kind)
    count = (latents if index is None else index).shape[0]
    _check_latents(latents, kind, count, patch, dtype)
    channels = latent_channels(kind, latents.shape[1])
    shape = (count, channels, *latents.shape[2:])
    for name, tensor, allowed, dtypes in (
        ("t_index", t_index, (count,), _ROWS),
        ("index", index, (count,), _ROWS),
        ("ids", ids, (count,), _ROWS),
        ("flip", flip, (count,), (torch.bool,)),
        ("scale", scale, (channels,), _REALS),
        ("shift", shift, (channels,), _REALS),
        ("noise", noise, shape, _REALS),
        ("posterior_noise", posterior_noise, shape, _REALS),
    ):
        if tensor is not None:
            check_tensor("q_sample", name, tensor, allowed, dtypes, latents.device)
    _check_coefficients(coefficients, None if t_index is not None else count, latents.device)
    check_rows("q_sample", "t_index", t_index, coefficients.shape[0])
    check_rows("q_sample", "index", index, latents.shape[0])
    if (noise is None or (with_posterior and posterior_noise is None)) and (ids is None or seed is None):
        raise ValueError("q_sample: noise is not given, so ids and seed are needed to draw it")
    args: dict[str, Any] = {
        "latents": latents.contiguous(),
        "coefficients": _plain(coefficients, torch.float32),
        "t_index": _plain(t_index, torch.int64),
        "index": _plain(index, torch.int64),
        "kind": KINDS.index(kind),
        "scale": _plain(scale, torch.float32),
        "shift": _plain(shift, torch.float32),
        "flip": _plain(flip, torch.bool),
        "ids": _plain(ids, torch.int64),
        "seed": signed_seed(seed or 0),
        "purpose": int(purpose),
        "noise": _plain(noise, torch.float32),
        "posterior_noise": _plain(posterior_noise, torch.float32) if with_posterior else None,
        "patch": patch,
        "dtype": dtype,
    }
    if reference_needed(latents, coefficients, scale, shift, noise, posterior_noise):
        return q_sample_reference(**args)
    return _op(**args)


def q_sample_reference(
    latents: Tensor,
    coefficients: Tensor,
    t_index: Tensor | None,
    *,
    index: Tensor | None,
    kind: int,
    scale: Tensor | None,
    shift: Tensor | None,
    flip: Tensor | None,
    ids: Tensor | None,
    seed: int,
    purpose: int,
    noise: Tensor | None,
    posterior_noise: Tensor | None,
    patch: int,
    dtype: torch.dtype,
) -> QSample:
    """The definition of :func:`q_sample`; ``kind`` is the place in ``KINDS``, ``seed`` the signed integer of its
    64 bits."""
    stored = latents if index is None else latents[index]
    channels = latent_channels(KINDS[kind], stored.shape[1])
    shape = (channels, *stored.shape[2:])

    def drawn(given: Tensor | None, stream: Stream) -> Tensor:
        if given is not None:
            return given.float()
        assert ids is not None
        return normals(unsigned_seed(seed), Purpose(purpose), stream, ids, shape)

    if KINDS[kind] == "pixels":
        x_start = (2.0 * stored.float() - 255.0) / 255.0
    elif KINDS[kind] == "sample":
        x_start = stored.float()
    else:
        mean, spread = stored.float().chunk(2, dim=1)
        std = spread if KINDS[kind] == "mean_std" else torch.exp(0.5 * spread.clamp(*LOGVAR_RANGE))
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
    x_t = (alpha * x_start + sigma * eps).to(dtype)
    return QSample(x_t=patchify(x_t, patch), target=c_x * x_start + c_eps * eps)


def _check_latents(latents: Tensor, kind: str, count: int, patch: int, dtype: torch.dtype) -> None:
    if kind not in KINDS:
        raise ValueError(f"q_sample: kind: given {kind!r}, allowed {', '.join(KINDS)}")
    if latents.dim() != 4:
        raise ValueError(f"q_sample: latents: given shape {tuple(latents.shape)}, allowed (M, C, H, W)")
    if (kind == "pixels") != (latents.dtype == torch.uint8):
        raise ValueError(f"q_sample: latents: given {latents.dtype} for kind {kind!r}; uint8 goes with pixels alone")
    check_dtype("q_sample", "latents", latents, *_FLOATS, torch.uint8)
    if has_posterior(kind) and latents.shape[1] % 2:
        raise ValueError(f"q_sample: latents: given {latents.shape[1]} channels, allowed an even number for {kind!r}")
    if dtype not in _FLOATS:
        raise ValueError(f"q_sample: dtype: given {dtype}, allowed {', '.join(map(str, _FLOATS))}")
    if not count:
        raise ValueError("q_sample: latents: given 0 images, allowed 1 or more")
    check_patch("q_sample", patch, *latents.shape[2:])


def _check_coefficients(coefficients: Tensor, count: int | None, device: torch.device) -> None:
    """``count`` is the number of rows, None that of a table."""
    rows, *row = coefficients.shape or (0,)
    if row != [4] or count not in (None, rows):
        allowed = "(K, 4)" if count is None else f"({count}, 4), or (K, 4) with t_index"
        raise ValueError(f"q_sample: coefficients: given shape {tuple(coefficients.shape)}, allowed {allowed}")
    check_tensor("q_sample", "coefficients", coefficients, coefficients.shape, _REALS, device)
    check_finite("q_sample", "coefficients", coefficients)


def _plain(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As kernels take it: contiguous, of one dtype."""
    if tensor is None or (tensor.dtype is dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def _empty(latents: Tensor, index: Tensor | None, kind: int, patch: int, dtype: torch.dtype, **_: Any) -> QSample:
    rows, stored, height, width = latents.shape
    count = rows if index is None else index.shape[0]
    shape = (count, latent_channels(KINDS[kind], stored), height, width)
    x_t = latents.new_empty(patch_shape(shape, patch), dtype=dtype)
    return QSample(x_t, latents.new_empty(shape, dtype=torch.float32))


_op = Op("q_sample", Pass(q_sample_reference, _empty), backends=(Extension("cuda"), Triton(), Extension("cpu")))
