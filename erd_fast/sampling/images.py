"""Samples as pictures: from x0 to uint8, into PNG grids, folders of PNGs, and .npz files."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from erd_fast.autoencoder import Autoencoder
from erd_fast.diffusion.schedule import Schedule
from erd_fast.errors import ConfigError, RunError
from erd_fast.files import make_folder, write_bytes
from erd_fast.random import Purpose, Stream, normals
from erd_fast.sampling.heun import heun

Pixels = NDArray[np.uint8]
Latents = NDArray[np.float32]
Decode = Callable[[Tensor], Pixels]
"""From samples x0 (N, C, H, W) to images (N, H, W, channels)."""
SUFFIXES = (".png", ".npz")
_SMALLEST_TILE = 64  # pixels; smaller images are enlarged, so that a grid of 8 x 8 digits can be seen


def generate(
    model: Any,
    schedule: Schedule,
    target: str,
    labels: Tensor | None,
    count: int,
    *,
    seed: int,
    batch_size: int = 128,
    **how: Any,
) -> Tensor:
    """``count`` samples by :func:`heun`; image i depends on (seed, i, its label) alone, not on the batch size.

    The model gives the shape (``in_channels``, ``input_size``) and the device; ``how`` goes to the sampler.
    """
    device = next(model.parameters()).device
    shape = (model.in_channels, model.input_size, model.input_size)
    parts = []
    for start in range(0, count, batch_size):
        ids = torch.arange(start, min(start + batch_size, count), device=device)
        noise = normals(seed, Purpose.SAMPLE, Stream.NOISE, ids, shape)
        batch_labels = None if labels is None else labels[start : start + batch_size].to(device)
        parts.append(heun(model, schedule, target, noise, labels=batch_labels, **how))
    return torch.cat(parts)


def to_pixels(x: Tensor) -> Pixels:
    """x0 in [-1, 1], (N, C, H, W), to uint8 NHWC; values outside are clipped."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_latents(x: Tensor, scale: Sequence[float], shift: Sequence[float]) -> Tensor:
    """x0 (N, C, H, W) to what an autoencoder decodes: z = x0 / scale + shift per channel, float32 on the CPU. An empty
    scale is 1, an empty shift 0."""
    latents = x.float().cpu()
    if scale:
        latents = latents / torch.tensor(scale)[:, None, None]
    return latents + torch.tensor(shift)[:, None, None] if shift else latents


def latent_decoder(
    autoencoder: Autoencoder, scale: Sequence[float], shift: Sequence[float], pixel_range: tuple[float, float]
) -> Decode:
    """Decode samples by ``autoencoder`` on their device, where it takes no memory before and after; scale, shift and
    pixel range are those of the store."""

    def decode(x: Tensor) -> Pixels:
        with autoencoder.on(x.device):
            return autoencoder.decode(to_latents(x, scale, shift), pixel_range).numpy()

    return decode


def grid(pixels: Pixels, columns: int = 10) -> Image.Image:
    """One picture of uint8 NHWC images in rows, enlarged (nearest neighbour, whole factor) to 64 pixels or more."""
    count, height, width, channels = pixels.shape
    factor = max(1, -(-_SMALLEST_TILE // max(height, width)))
    tiles = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    columns = min(columns, count)
    rows, gap = -(-count // columns), 2
    height, width = height * factor + gap, width * factor + gap
    sheet = np.full((rows * height + gap, columns * width + gap, channels), 255, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = gap + number // columns * height, gap + number % columns * width
        sheet[top : top + height - gap, left : left + width - gap] = tile
    return _picture(sheet)


def check_output(out: Path) -> None:
    """Raise ConfigError if ``out`` ends like a file that :func:`save` cannot write."""
    if re.fullmatch(r"\.[A-Za-z]+\d?", out.suffix) and out.suffix not in SUFFIXES:
        raise ConfigError(f"out: given {out}, allowed a name ending in .png or .npz, or a folder")


def prepare_output(out: Path) -> None:
    """Make the folder that ``out`` needs, so that samples are not drawn in vain. Raises RunError without permission, or
    where a folder has the name of the file."""
    if out.suffix in SUFFIXES and out.is_dir():
        raise RunError(f"out must be a file, got the folder {out}")
    make_folder(out.parent if out.suffix in SUFFIXES else out)


def save(samples: Pixels | Latents, labels: NDArray[np.int64] | None, out: Path, columns: int = 10) -> None:
    """Write uint8 NHWC images: ``x.png`` a grid, ``x.npz`` arrays arr_0 (images) and arr_1 (labels), else a folder of
    PNGs. Latents go to ``x.npz`` alone.

    Raises:
        ConfigError: another ending. RunError: no permission.
    """
    check_output(out)
    prepare_output(out)
    pictures = cast(Pixels, samples)
    if samples.dtype != np.uint8 and out.suffix != ".npz":
        raise ConfigError(f"out must end in .npz for latents, got {out}")
    content = io.BytesIO()
    if out.suffix == ".npz":
        np.savez(content, samples) if labels is None else np.savez(content, samples, labels)
        write_bytes(out, content.getvalue())
    elif out.suffix == ".png":
        grid(pictures, columns).save(content, "png")
        write_bytes(out, content.getvalue())
    else:
        for number, image in enumerate(pictures):
            _picture(image).save(out / f"{number:06d}.png")


def _picture(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
