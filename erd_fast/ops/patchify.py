"""Image and patch layout: (N, C, H, W), or tokens (N, T, p * p * C) as transformers take and give them.

Token (y // p, x // p) in rows; its feature ((y % p) * p + x % p) * C + c, the order of DiT's final layer.
"""

from torch import Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """(N, C, H, W) -> (N, (H / p)(W / p), p * p * C); ``patch`` 0 leaves images as they are."""
    if not patch:
        return images
    n, c, h, w = images.shape
    split = images.reshape(n, c, h // patch, patch, w // patch, patch)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(n, (h // patch) * (w // patch), patch * patch * c)


def patch_shape(shape: tuple[int, ...], patch: int) -> tuple[int, ...]:
    """Shape of :func:`patchify` of images of ``shape``."""
    n, c, h, w = shape
    return ((n, (h // patch) * (w // patch), patch * patch * c)) if patch else shape


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of :func:`patchify`."""
    if not patch:
        return tokens
    n, _, features = tokens.shape
    rows, columns, c = height // patch, width // patch, features // (patch * patch)
    split = tokens.reshape(n, rows, columns, patch, patch, c)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(n, c, height, width)


def check_patch(op: str, patch: int, height: int, width: int) -> None:
    """Raise ValueError unless ``patch`` is 0 or divides both sides."""
    if patch < 0 or (patch and (height % patch or width % patch)):
        raise ValueError(f"{op}: patch: given {patch}, allowed 0 or a divisor of {height} and {width}")
