"""Presets: named configurations, each a function whose docstring gives hardware, time and quality."""

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


PRESETS: dict[str, Callable[[], RunConfig]] = {"digits": digits, "fashion-mnist": fashion_mnist}


def get_preset(name: str) -> RunConfig:
    """The configuration of preset ``name``. Raises ConfigError for an unknown one, naming the nearest."""
    if name not in PRESETS:
        raise ConfigError(unknown_name("preset", name, PRESETS))
    return PRESETS[name]()


def describe_presets() -> str:
    """A paragraph for each preset: name, and the first line of its docstring."""
    return "\n\n".join(f"{name}: {(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items())
