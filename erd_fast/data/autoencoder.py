"""The autoencoder of latents: diffusers' AutoencoderKL, from a folder or the Hugging Face hub."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from erd_fast.data.manifest import LatentKind
from erd_fast.errors import DataError
from erd_fast.extras import load
from erd_fast.files import read_json

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Autoencoder:
    """Pixels to latents, and back.

    Args:
        source: a folder of an AutoencoderKL, or of a pipeline that has one as ``vae``; or a name on the hub.
        device, precision: of what it computes.

    Attributes:
        name: of the manifest: the folder's or hub's name, and the beginning of a hash of the weights.
        channels: C of the latents.
        factor: pixels of a side over numbers of a side.
        scale, shift: x0 = (z - shift) * scale for each channel, of its configuration; shift is empty where it has none.

    Raises:
        DataError: there is no such autoencoder. ConfigError: diffusers is not installed.
    """

    def __init__(self, source: str, device: torch.device, precision: Precision):
        self._device, self._dtype = device, _DTYPES.get(precision, torch.float32)
        self._vae = _load(source, self._dtype).to(device).to(memory_format=torch.channels_last).eval()
        self._vae.requires_grad_(False)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
            torch.backends.cudnn.allow_tf32 = precision != "fp32"
            torch.backends.cudnn.deterministic = True
        config = self._vae.config
        self.channels: int = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.scale = (float(config.scaling_factor),) * self.channels
        shift = getattr(config, "shift_factor", None)
        self.shift = (float(shift),) * self.channels if shift else ()
        self.name = f"{Path(source).resolve().name if Path(source).is_dir() else source}@{_hash_of(self._vae)}"

    @torch.inference_mode()
    def encode(self, pixels: Tensor, kind: LatentKind) -> "Encoding":
        """Begin to encode ``pixels`` (n, H, W, 3) uint8: mean and std, or mean and log-variance."""
        if self._device.type == "cuda":
            pixels = pixels.pin_memory()
        images = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2)  # channels last as they lie
        posterior = self._vae.encode(images.to(self._dtype) / 127.5 - 1).latent_dist
        second = posterior.logvar if kind == "mean_logvar" else posterior.std
        return Encoding(torch.cat((posterior.mean, second), dim=1).float().contiguous())

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (n, H, W, 3) uint8 of latents (n, C, h, w) that are not scaled."""
        images = self._vae.decode(latents.to(self._device, self._dtype)).sample.float()
        return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


class Encoding:
    """Latents on their way from the device. Work that is begun after this one is not waited for."""

    def __init__(self, latents: Tensor):
        self._done = torch.cuda.Event() if latents.is_cuda else None
        if self._done is not None:
            latents = torch.empty_like(latents, device="cpu", pin_memory=True).copy_(latents, non_blocking=True)
            self._done.record()
        self._latents = latents

    def result(self) -> Tensor:
        """(n, 2C, h, w) float32 on the CPU."""
        if self._done is not None:
            self._done.synchronize()
        return self._latents


def _load(source: str, dtype: torch.dtype) -> Any:
    diffusers = load("diffusers", "vae", f"vae {source}")
    folder = Path(source)
    how: dict[str, Any] = {"use_safetensors": True, "low_cpu_mem_usage": False, "torch_dtype": dtype}
    if folder.is_dir():
        folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
        _check_config(folder / "config.json")
        how["local_files_only"] = True
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(f"vae: {source} is no folder")
    try:
        return diffusers.AutoencoderKL.from_pretrained(folder if folder.is_dir() else source, **how)
    except Exception as error:  # of diffusers, the hub's client, safetensors: each has its own
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"vae: {source} cannot be loaded as an AutoencoderKL with safetensors: {reason}") from error


def _check_config(file: Path) -> None:
    found = read_json(file)
    name = found.get("_class_name") if isinstance(found, dict) else None
    if name != "AutoencoderKL":
        raise DataError(f"{file}: _class_name: given {name!r}, allowed 'AutoencoderKL'")


def _hash_of(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:8]
