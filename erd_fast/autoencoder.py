"""The autoencoder of latents: diffusers' AutoencoderKL, from a folder or the Hugging Face hub."""

import contextlib
import functools
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from erd_fast.errors import ConfigError, DataError
from erd_fast.extras import load
from erd_fast.numerics import PRECISION_DTYPES, Precision, float32_products

_Found = TypeVar("_Found")


class Posterior(NamedTuple):
    """What an encoder says of images: a normal distribution for each number of their latents, (n, C, h, w) float32."""

    mean: Tensor
    std: Tensor
    logvar: Tensor


class Autoencoder:
    """Pixels to latents, and back.

    Args:
        source: a folder of an AutoencoderKL, or of a pipeline that has one as ``vae``; or an ID of the hub.
        device, precision: of what it computes.
        download: whether an ID may be downloaded; otherwise it must be in the local cache, and no request is sent.

    Attributes:
        name: ``vae`` of the manifest: the folder's name or the ID, and the beginning of a hash of the weights.
        source: ``vae_source`` of the manifest: the folder's absolute path, or the ID.
        channels: C of the latents.
        factor: H / h = W / w.
        scale, shift: x0 = (z - shift) * scale for each channel, as its configuration says; shift is empty for 0.

    Raises:
        DataError: there is no such autoencoder. ConfigError: diffusers is not installed.
    """

    def __init__(self, source: str, device: torch.device, precision: Precision = "tf32", *, download: bool = True):
        self._vae = _load(source, download)
        local = Path(source).is_dir()
        self.name = f"{Path(source).resolve().name if local else source}@{_hash_of(self._vae)}"
        self.source = os.path.abspath(source) if local else source
        config = self._vae.config
        self.channels: int = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.scale, self.shift = _scale_and_shift(config)
        self._precision, self._dtype = precision, PRECISION_DTYPES[precision]
        self._move(device)
        self._vae.to(memory_format=torch.channels_last).requires_grad_(False).eval()

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Compute on ``device`` within the block. Then the weights return to where they were, and their memory on
        ``device`` is free."""
        home = self.device
        try:
            self._move(device)
            yield
        finally:
            self._move(home)

    def encode(self, pixels: Tensor) -> Posterior:
        """Of ``pixels`` (n, H, W, 3) uint8, fed as -1 to 1."""
        with self._products():
            if self.device.type == "cpu":
                return Posterior(*map(torch.cat, zip(*_one_by_one(self._encode, pixels), strict=True)))
            return self._encode(pixels)

    def decode(self, latents: Tensor, pixel_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
        """Pixels (n, H, W, 3) uint8, on the CPU, of latents (n, C, h, w) that are not scaled. ``pixel_range`` is the
        range of the pixels that were encoded."""
        decode = functools.partial(self._decode, pixel_range)
        with self._products():
            if self.device.type == "cpu":
                return torch.cat(_one_by_one(decode, latents))
            return torch.cat([decode(row).cpu() for row in latents.split(1)])  # takes more memory than to encode

    def _move(self, device: torch.device) -> None:
        self.device = device
        # Not by diffusers' own `to`, which warns of a dtype, as of other models it keeps parts in float32.
        torch.nn.Module.to(self._vae, device, self._dtype)

    def _products(self) -> contextlib.AbstractContextManager[None]:
        return float32_products(tf32=self.device.type == "cuda" and self._precision != "fp32", deterministic=True)

    @torch.inference_mode()
    def _encode(self, pixels: Tensor) -> Posterior:
        images = pixels.to(self.device).permute(0, 3, 1, 2)  # as it lies, channels last
        found = self._vae.encode((images.float() / 127.5 - 1).to(self._dtype)).latent_dist
        logvar = found.logvar.float()
        return Posterior(found.mean.float(), (0.5 * logvar).exp(), logvar)

    @torch.inference_mode()
    def _decode(self, pixel_range: tuple[float, float], latents: Tensor) -> Tensor:
        low, high = pixel_range
        images = self._vae.decode(latents.to(self.device, self._dtype)).sample.float()
        return ((images - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def open_autoencoder(given: str, *, vae: str, vae_source: str, channels: int) -> Autoencoder:
    """The autoencoder to decode latents with, on the CPU.

    Args:
        given: the user's choice: a folder, or an ID of the hub, which may be downloaded. Empty: the recorded one, from
            local files and the local Hugging Face cache only.
        vae, vae_source: what the manifest or the checkpoint records. Where ``vae`` ends with a hash of the weights, a
            recorded autoencoder must have it; a given one with another hash is used with a warning.
        channels: C of the latents.

    Raises:
        ConfigError: diffusers is not installed, or the autoencoder's latents have another number of channels.
        DataError: none is recorded, it does not exist, or its weights are not the recorded ones.
    """
    if not given and not vae_source:
        raise DataError(f"the source of the autoencoder{f' {vae}' if vae else ''} is not recorded")
    if not given and os.path.isabs(vae_source) and not os.path.isdir(vae_source):
        raise DataError(f"the recorded autoencoder {vae_source} does not exist")
    autoencoder = Autoencoder(given or vae_source, torch.device("cpu"), download=bool(given))
    if autoencoder.channels != channels:
        raise ConfigError(f"vae must have {channels} latent channels, got {autoencoder.channels} ({autoencoder.name})")
    known = re.search(r"@[0-9a-f]{8}$", vae)
    if known and not autoencoder.name.endswith(known[0]):
        if not given:
            raise DataError(f"{vae_source} is now {autoencoder.name}, but the latents were made by {vae}")
        warnings.warn(f"decoding with {autoencoder.name}; the latents were made by {vae}", stacklevel=2)
    return autoencoder


def _one_by_one(compute: Callable[[Tensor], _Found], rows: Tensor) -> list[_Found]:
    """Each row on a CPU by one thread, several rows at a time. Sums over parts of a row, a part for each thread, would
    depend on the number of threads."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(compute, rows.split(1)))
    torch.set_num_threads(threads)  # for threads to come
    return found


def _load(source: str, download: bool) -> Any:
    diffusers = load("diffusers", "vae", f"vae {source}")
    folder = Path(source)
    if folder.is_dir():
        folder = folder if (folder / "config.json").is_file() else folder / "vae"
        if not (folder / "config.json").is_file():
            raise DataError(
                f"vae must be the folder of an AutoencoderKL or of a pipeline, got {source}, which has no config.json"
            )
        return _loaded(diffusers, source, str(folder), local_files_only=True)
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or folder.parent.is_dir():
        raise DataError(
            f"vae must be a folder that exists or an ID of the Hugging Face hub such as owner/name, got {source}"
        )
    if download:
        return _loaded(diffusers, source, source)
    return _loaded(diffusers, source, _cached(source), local_files_only=True)


def _cached(source: str) -> str:
    """The folder of ``source`` in the local cache. The hub's client would send a request even for local files only."""
    hub = load("huggingface_hub", "vae", f"vae {source}")
    try:
        config = hub.try_to_load_from_cache(source, "config.json")
    except ValueError:  # the hub has no such names
        config = None
    if not isinstance(config, str):
        raise DataError(f'vae: {source} is not in the local Hugging Face cache ("hf download {source}" fetches it)')
    return str(Path(config).parent)


def _loaded(diffusers: Any, given: str, source: str, **how: Any) -> Any:
    said = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)  # we say what is wrong
    try:
        with warnings.catch_warnings(action="ignore"):
            _check_config(given, diffusers.AutoencoderKL.load_config(source, **how))
            model, about = diffusers.AutoencoderKL.from_pretrained(
                source, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True, **how
            )
    except DataError:
        raise
    except Exception as error:  # of diffusers, the hub's client, safetensors: each has its own
        fault = (
            "cannot be loaded from safetensors" if how else "is no folder, and the Hugging Face hub does not give it"
        )
        raise DataError(f"vae: {given} {fault}: {_cause(error)}") from error
    finally:
        diffusers.utils.logging.set_verbosity(said)
    if missing := sorted(about["missing_keys"]):
        raise DataError(f"vae: {given}: its file lacks {len(missing)} weights, first {missing[0]}; allowed all")
    return model


def _check_config(given: str, config: dict[str, Any]) -> None:
    for field, allowed in (("_class_name", "AutoencoderKL"), ("in_channels", 3), ("out_channels", 3)):
        if (found := config.get(field, allowed)) != allowed:
            raise DataError(f"vae: {given}: config.json: {field}: given {found!r}, allowed {allowed!r}")


def _cause(error: BaseException) -> str:
    """The text of what an error began with, which those after it hide."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return " ".join(str(error).split())[:300]


def _scale_and_shift(config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = config.latent_channels
    means, stds = config.get("latents_mean"), config.get("latents_std")
    shift = means or (config.get("shift_factor") or 0.0,) * channels
    scale = [config.scaling_factor / std for std in stds or (1.0,) * channels]
    return tuple(map(float, scale)), tuple(map(float, shift)) if any(shift) else ()


def _hash_of(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:8]
