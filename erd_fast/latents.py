"""Kinds of stored latents, and how many channels each kind stores."""

from typing import Literal, get_args

FloatKind = Literal["sample", "mean_std", "mean_logvar"]
"""Kinds of floating-point latents: ready samples; mean and std of an autoencoder's posterior; mean and log-variance."""

LatentKind = Literal[FloatKind, "pixels"]
"""Every kind: ``pixels`` are uint8 images."""

FLOAT_KINDS: tuple[FloatKind, ...] = get_args(FloatKind)
KINDS: tuple[LatentKind, ...] = get_args(LatentKind)
"""In the order of the numbers that kernels use for them."""
POSTERIOR_KINDS: tuple[LatentKind, ...] = ("mean_std", "mean_logvar")
LOGVAR_RANGE = (-30.0, 20.0)
"""Clamp of the log-variance, as in the LDM autoencoder and in diffusers."""


def has_posterior(kind: str) -> bool:
    """Whether latents of this kind are the parameters of a normal distribution, from which samples are drawn."""
    return kind in POSTERIOR_KINDS


def stored_channels(kind: str, channels: int) -> int:
    """Number of channels stored for latents of ``channels`` channels."""
    return 2 * channels if has_posterior(kind) else channels


def latent_channels(kind: str, stored: int) -> int:
    """Number of channels of the latents that ``stored`` channels hold; inverse of :func:`stored_channels`."""
    return stored // 2 if has_posterior(kind) else stored
