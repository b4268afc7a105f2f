"""Presets: named configurations, each a function whose docstring gives hardware, time and quality.

Those of ImageNet and CelebA follow the recipe of the ERD paper (docs/math.md F), with bf16 in place of fp16. Where the
paper gives two values, the function says which it takes. They need ``--data.path``: a store of latents (4, 32, 32),
or of pixels (3, 64, 64). ``custom`` takes any store.
"""

from collections.abc import Callable

from erd_fast.data.importers import FASHION_MNIST
from erd_fast.errors import ConfigError, unknown_name
from erd_fast.training.config import (
    DataConfig,
    DiffusionConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)


def digits() -> RunConfig:
    """Handwritten digits, 8 x 8, class-conditional DiT. 2 CPU cores: 3 minutes, class_accuracy 0.99.

    Bundled data (scikit-learn). The quality is that of the command in README.md.
    """
    return RunConfig(
        train=TrainConfig(steps=640, batch_size=64, precision="fp32", log_every=20, save_every=160, sample_every=160),
        data=DataConfig(path="digits"),
        model=ModelConfig(name="DiT-tiny/2"),
        diffusion=DiffusionConfig(schedule="cosine", target="v", weighting="erd"),
        optim=OptimConfig(lr=1e-3, ema_decay=0.99),
        eval=EvalConfig(images=300, cfg_scale=1.5),
    )


def fashion_mnist() -> RunConfig:
    """Fashion-MNIST, 28 x 28, class-conditional DiT. 2 CPU cores: not measured.

    ``data.path`` is where Debian's package dataset-fashion-mnist puts its files; any folder of IDX files does. The
    first run imports them into the cache.
    """
    return RunConfig(
        train=TrainConfig(steps=2000, batch_size=64, precision="fp32", log_every=20, save_every=200, sample_every=500),
        data=DataConfig(path=FASHION_MNIST),
        model=ModelConfig(name="DiT-tiny/4"),
        diffusion=DiffusionConfig(schedule="cosine", target="v", weighting="erd"),
        optim=OptimConfig(lr=1e-3, ema_decay=0.995),
        eval=EvalConfig(images=200, cfg_scale=1.5),
    )


def custom() -> RunConfig:
    """Your own latent store, DiT-S/2, 100K steps. A GPU: time and quality not measured.

    Neutral values to start from; the model takes image size, channels and classes from the store. On a CPU choose a
    tiny model and a small batch.
    """
    return RunConfig(
        train=TrainConfig(
            steps=100_000, batch_size=256, precision="bf16", log_every=50, save_every=5000, sample_every=5000
        ),
        model=ModelConfig(name="DiT-S/2"),
        diffusion=DiffusionConfig(schedule="cosine", target="v", weighting="erd"),
        optim=OptimConfig(lr=1e-4, ema_decay=0.9999),
        eval=EvalConfig(images=0),
    )


def _imagenet(model: str, betas: tuple[float, float]) -> RunConfig:
    """Table 5 and Section G.1 of the paper: 400K steps of 256 latents, constant learning rate 1e-4, no decay, EMA
    0.9999, labels dropped with probability 0.1. They name no gradient clipping, so there is none."""
    return RunConfig(
        train=TrainConfig(steps=400_000, batch_size=256, label_drop=0.1, precision="bf16"),
        model=ModelConfig(name=model),
        diffusion=DiffusionConfig(schedule="cosine", target="eps", weighting="erd"),
        optim=OptimConfig(lr=1e-4, betas=betas, weight_decay=0.0, ema_decay=0.9999, grad_clip=0.0),
        eval=EvalConfig(images=0),
    )


def dit_s_2() -> RunConfig:
    """ImageNet latents, DiT-S/2, 400K steps. A GPU: time and quality not measured.

    Betas (0.9, 0.95), as in the last line of the paper's Table 1; its Table 5 does not list this size.
    """
    return _imagenet("DiT-S/2", betas=(0.9, 0.95))


def dit_b_2() -> RunConfig:
    """ImageNet latents, DiT-B/2, 400K steps. A GPU: time and quality not measured.

    Betas (0.9, 0.999) of the paper's Table 5; its Section 4.3 and the public code have (0.9, 0.95). So for L and XL.
    """
    return _imagenet("DiT-B/2", betas=(0.9, 0.999))


def dit_l_2() -> RunConfig:
    """ImageNet latents, DiT-L/2, 400K steps. GPUs of 80 GB: time and quality not measured."""
    return _imagenet("DiT-L/2", betas=(0.9, 0.999))


def dit_xl_2() -> RunConfig:
    """ImageNet latents, DiT-XL/2, 400K steps. GPUs of 80 GB: time and quality not measured."""
    return _imagenet("DiT-XL/2", betas=(0.9, 0.999))


def uvit_s_2() -> RunConfig:
    """ImageNet latents, U-ViT-S/2, 400K steps. A GPU: time and quality not measured.

    U-ViT's own training differs: learning rate 2e-4, weight decay 0.03, batch 1024, schedule of Stable Diffusion.
    """
    return _imagenet("U-ViT-S/2", betas=(0.99, 0.99))


def uvit_m_2() -> RunConfig:
    """ImageNet latents, U-ViT-M/2, 400K steps. A GPU: time and quality not measured."""
    return _imagenet("U-ViT-M/2", betas=(0.99, 0.99))


def uvit_l_2() -> RunConfig:
    """ImageNet latents, U-ViT-L/2, 400K steps. GPUs of 80 GB: time and quality not measured."""
    return _imagenet("U-ViT-L/2", betas=(0.99, 0.99))


def uvit_h_2() -> RunConfig:
    """ImageNet latents, U-ViT-H/2, 400K steps. GPUs of 80 GB: time and quality not measured.

    The paper's results with guidance are those of 4,000,000 steps (800 epochs). Its Table 5 gives guidance 1.35; the
    lowest FID of its Table 8 is at 1.50. No convolution at the end, as in Table 5; the public code builds one.
    """
    return _imagenet("U-ViT-H/2", betas=(0.99, 0.99))


def _celeba(model: str, betas: tuple[float, float]) -> RunConfig:
    """Section 4.2 of the paper: 500K steps of 128 images without labels, Adam with learning rate 1e-4 (its text gives
    no legible exponent for DiT)."""
    return RunConfig(
        train=TrainConfig(steps=500_000, batch_size=128, label_drop=0.0, precision="bf16"),
        model=ModelConfig(name=model),
        diffusion=DiffusionConfig(schedule="cosine", target="eps", weighting="erd"),
        optim=OptimConfig(lr=1e-4, betas=betas, weight_decay=0.0, ema_decay=0.9999, grad_clip=0.0),
        eval=EvalConfig(images=0),
    )


def celeba64_unet() -> RunConfig:
    """CelebA 64 x 64 pixels, ADM U-Net, 500K steps. A GPU: time and quality not measured.

    59M parameters, the model of the public code's first version; the paper prints 50M, and the code's later version has
    128M. ``erd-fast data import celeba`` makes the store.
    """
    return _celeba("ADM-CelebA64", betas=(0.9, 0.999))


def celeba64_dit_s() -> RunConfig:
    """CelebA 64 x 64 pixels, DiT-S/4, 500K steps. A GPU: time and quality not measured.

    The paper gives 33M parameters and no patch size; with 4 they are 32.5M. Betas (0.9, 0.95).
    """
    return _celeba("DiT-S/4", betas=(0.9, 0.95))


_ALL = (
    digits,
    fashion_mnist,
    custom,
    dit_s_2,
    dit_b_2,
    dit_l_2,
    dit_xl_2,
    uvit_s_2,
    uvit_m_2,
    uvit_l_2,
    uvit_h_2,
    celeba64_unet,
    celeba64_dit_s,
)
PRESETS: dict[str, Callable[[], RunConfig]] = {make.__name__.replace("_", "-"): make for make in _ALL}


def get_preset(name: str) -> RunConfig:
    """The configuration of preset ``name``. Raises ConfigError for an unknown one, naming the nearest."""
    if name not in PRESETS:
        raise ConfigError(unknown_name("preset", name, PRESETS))
    return PRESETS[name]()


def describe_presets() -> str:
    """A paragraph for each preset: name, and the first line of its docstring."""
    return "\n\n".join(f"{name}: {(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items())
