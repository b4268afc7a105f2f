"""Configuration of a run: frozen dataclasses, checked when made, with messages that name field, given and allowed."""

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import yaml

from erd_fast.data.loaders import Loader
from erd_fast.diffusion import RULES, SCHEDULES, resolve_target
from erd_fast.diffusion.timesteps import TSampler
from erd_fast.diffusion.weighting import Normalize, Reading
from erd_fast.errors import ConfigError, unknown_name
from erd_fast.models import MODELS
from erd_fast.numerics import Precision
from erd_fast.training.tracking import Track

SWITCH = {"on": True, "off": False, "true": True, "false": False}
"""How booleans may be written, in any case; YAML itself has these words for them."""
LrSchedule = Literal["constant", "cosine"]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, batch and bookkeeping. Every ``*_every`` counts steps; 0 is never."""

    steps: int = 400_000
    """Optimizer steps of the whole run."""
    batch_size: int = 256
    """Images of one step, over all ranks and micro-batches."""
    micro_batch: int = 0
    """Images of one forward pass, a divisor of batch_size; 0 is the whole batch. Changes memory, not the batch."""
    seed: int = 0
    """Key of all randomness."""
    label_drop: float = 0.1
    """Probability of training an image without its label; 0 trains no null label, and guidance is not possible."""
    precision: Precision = "bf16"
    """Of the forward and backward pass; master parameters, optimizer state and loss are fp32. fp16 scales its loss;
    tf32 is fp32 with TensorFloat-32 products on a GPU."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients are summed over ranks; bf16 halves what they send, and rounds."""
    cuda_graph: bool = True
    """On a GPU the whole step as one CUDA graph; off launches kernel by kernel, with the same numbers."""
    deterministic: bool = False
    """Refuse operations whose result can differ between two runs on one machine."""
    log_every: int = 100
    save_every: int = 10_000
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; 0 keeps all."""
    sample_every: int = 10_000
    """Steps between previews of 40 images."""
    track: Track = "none"
    """Metrics go to tensorboard (the run's folder tensorboard) or wandb too; pip install 'erd-fast[track]'."""

    def __post_init__(self) -> None:
        _at_least("train", self, steps=1, batch_size=1, micro_batch=0, log_every=1)
        _at_least("train", self, save_every=0, keep_checkpoints=0, sample_every=0)
        _allow("train.seed", self.seed, 0 <= self.seed < 2**64, "0 to 2**64 - 1")
        _allow("train.label_drop", self.label_drop, 0 <= self.label_drop <= 1, "0 to 1")
        divides = self.micro_batch == 0 or self.batch_size % self.micro_batch == 0
        _allow(
            "train.micro_batch", self.micro_batch, divides, f"divisors of train.batch_size = {self.batch_size}, or 0"
        )
        _one_of("train.precision", self.precision, get_args(Precision))
        _one_of("train.reduce_dtype", self.reduce_dtype, ("fp32", "bf16"))
        _one_of("train.track", self.track, get_args(Track))
        _booleans("train", self)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    path: str = ""
    """Folder of a latent store or of IDX files, or the name of a bundled data set (digits)."""
    loader: Loader = "auto"
    """resident: a copy on the device; mmap: rows read ahead from the files; dali: the same by NVIDIA DALI
    (pip install 'erd-fast[dali]'); auto: resident if there is room, else mmap."""

    check: bool = True
    """Look at some rows before training: numbers that are not finite, or whose std after scaling is far from 1, are
    refused; off trains on them."""

    def __post_init__(self) -> None:
        _booleans("data", self)
        _one_of("data.loader", self.loader, get_args(Loader))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model. Image size, channels and classes come from the store."""

    name: str = "DiT-XL/2"
    """DiT-S/2, DiT-XL/4, ...: size tiny, S, B, L or XL, and patch 1, 2, 4 or 8. U-ViT-H/2, ...: tiny, S, S-D, M, L or
    H, and patch 2 or 4. ADM-tiny, ADM-CelebA64, ADM-64."""
    hidden_size: int | None = None
    """In place of the named size's; so are the next three. A U-Net (ADM) has num_heads of these alone."""
    depth: int | None = None
    num_heads: int | None = None
    patch_size: int | None = None
    kernels: bool = True
    """The fused ops of the transformers; off is plain PyTorch, to compare with."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """The residual stream between the fused ops; bf16 halves its traffic and loses digits."""
    recompute: Literal["auto", "on", "off"] = "auto"
    """Make normalised inputs and GELU's outputs again in the backward pass, not keep them; auto is on a GPU."""

    def __post_init__(self) -> None:
        _booleans("model", self)
        if isinstance(self.recompute, bool):  # YAML's on and off
            object.__setattr__(self, "recompute", "on" if self.recompute else "off")
        _one_of("model.name", self.name, MODELS)
        _one_of("model.residual", self.residual, ("fp32", "bf16"))
        _one_of("model.recompute", self.recompute, ("auto", "on", "off"))
        for name, value in self.overrides().items():
            _allow(f"model.{name}", value, value >= 1, "1 or more")

    def overrides(self) -> dict[str, int]:
        """The sizes given in place of the named model's."""
        sizes = {name: getattr(self, name) for name in ("hidden_size", "depth", "num_heads", "patch_size")}
        return {name: value for name, value in sizes.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Process and objective."""

    schedule: str = "cosine"
    """cosine, ddpm_linear, logsnr (1000 steps); flow, vp, gvp, logsnr_flow (continuous)."""
    target: str = "eps"
    """What the model predicts: x0, eps, v, u, flow."""
    weighting: str = "erd"
    """Loss weighting over noise levels: constant, erd, min_snr, max_snr, soft_min_snr, p2, debias, min_debias,
    max_debias, snr, inv_snr, trunc_snr, sigma_sqrt, cosmap, sit_velocity, sit_likelihood."""
    gamma: float | None = None
    """SNR limit of min_snr, max_snr, soft_min_snr (5 unless given); exponent of p2 (1)."""
    k: float = 1.0
    """Of p2, 1 / (k + SNR)^gamma."""
    normalize: Normalize = "mean"
    """mean: keep the average loss scale; none: as the rule gives it; max: at most 1."""
    reading: Reading = "t"
    """t: the rule weights uniform t; log_snr: it is the wanted effort over log-SNR."""
    clip_max: float | None = None
    """Largest weight; 1 or more with normalize mean."""
    importance_correct: bool = False
    """Divide the weight by the timestep density: the objective of uniform t under any t_sampler."""
    t_sampler: TSampler = "uniform"
    """Timesteps: uniform, stratified over the batch, logit_normal, or drawn in proportion to the weight."""
    logit_mean: float = 0.0
    """Of logit_normal, t = sigmoid(logit_mean + logit_std n); above 0 there is more noise."""
    logit_std: float = 1.0
    """Of logit_normal."""

    def __post_init__(self) -> None:
        _one_of("diffusion.schedule", self.schedule, SCHEDULES)
        try:
            object.__setattr__(self, "target", resolve_target(self.target))  # one name in files, whichever was given
        except ConfigError as error:
            raise ConfigError(f"diffusion.target: {error}") from None
        _one_of("diffusion.weighting", self.weighting, RULES)
        _one_of("diffusion.normalize", self.normalize, get_args(Normalize))
        _one_of("diffusion.reading", self.reading, get_args(Reading))
        _one_of("diffusion.t_sampler", self.t_sampler, get_args(TSampler))
        rule, positive = RULES[self.weighting], "numbers above 0"
        for field in ("gamma", "k", "clip_max", "logit_std"):
            value = getattr(self, field)
            _allow(f"diffusion.{field}", value, value is None or 0 < value < float("inf"), positive)
        _allow("diffusion.logit_mean", self.logit_mean, math.isfinite(self.logit_mean), "finite numbers")
        reached = self.clip_max is None or self.clip_max >= 1 or self.normalize != "mean"
        _allow("diffusion.clip_max", self.clip_max, reached, "1 or more with normalize mean")
        with_gamma = ", ".join(name for name, other in RULES.items() if other.gamma is not None)
        takes_gamma = self.gamma is None or rule.gamma is not None
        _allow(
            "diffusion.gamma", self.gamma, takes_gamma, f"none with {self.weighting} (gamma belongs to {with_gamma})"
        )
        _allow("diffusion.k", self.k, self.k == 1.0 or rule.uses_k, f"1 with {self.weighting} (k belongs to p2)")
        _booleans("diffusion", self)
        weight_sampled = self.t_sampler == "weight" and self.importance_correct
        _allow("diffusion.importance_correct", True, not weight_sampled, "False with t_sampler weight")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and the average of the parameters."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    ema_decay: float = 0.9999
    """Decay of the averaged parameters, which sample; it warms up as (1 + n) / (10 + n)."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    warmup: int = 0
    """Steps of linear warm-up."""
    schedule: LrSchedule = "constant"
    """Learning rate after the warm-up: constant, or cosine to 0 at train.steps."""

    def __post_init__(self) -> None:
        _allow("optim.lr", self.lr, self.lr > 0, "numbers above 0")
        in_range = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _allow("optim.betas", self.betas, in_range, "two numbers from 0 to below 1")
        _at_least("optim", self, weight_decay=0, grad_clip=0, warmup=0)
        _allow("optim.ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "0 to below 1")
        _one_of("optim.schedule", self.schedule, get_args(LrSchedule))


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How samples are drawn and judged during and after training."""

    every: int = 0
    """Steps between evaluations; 0 evaluates once, at the end."""
    images: int = 1000
    """Samples to judge; 0 judges none."""
    sampler_steps: int = 18
    """Heun steps of previews and judged samples."""
    cfg_scale: float = 1.0
    """Guidance scale of previews and judged samples; 1 is off."""

    def __post_init__(self) -> None:
        _at_least("eval", self, every=0, images=0, sampler_steps=1)
        _allow("eval.images", self.images, self.images != 1, "0, or 2 or more: one has no covariance")
        _allow("eval.cfg_scale", self.cfg_scale, self.cfg_scale >= 0, "0 or more")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run."""

    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.train.label_drop == 0 and self.eval.cfg_scale != 1:
            raise ConfigError(
                f"eval.cfg_scale: given {self.eval.cfg_scale} with train.label_drop 0; "
                "guidance needs a trained null label"
            )

    def flat(self) -> dict[str, Any]:
        """{"train.steps": ..., ...} in the order of the sections."""
        sections = dataclasses.asdict(self)
        return {f"{name}.{field}": value for name, section in sections.items() for field, value in section.items()}


MAY_CHANGE_ON_RESUME = {
    "train.steps",
    "train.micro_batch",
    "train.cuda_graph",
    "train.track",
    "eval.every",
    "data.path",
    "data.loader",
    "data.check",
    "model.kernels",
    "model.recompute",
}


def refuse_changes(stored: RunConfig, given: RunConfig, folder: Path) -> None:
    """Raises ConfigError naming each field that may not change in a run folder, with both values."""
    old, new = stored.flat(), given.flat()
    fixed = [name for name in new if name not in MAY_CHANGE_ON_RESUME and not name.endswith("_every")]
    changed = [f"{name}: the run has {old[name]!r}, given {new[name]!r}" for name in fixed if old[name] != new[name]]
    if changed:
        raise ConfigError(
            f"{folder} holds a run of another configuration ({'; '.join(changed)}); "
            "give the run's own values to go on, or another folder by --out"
        )


def config_text(config: RunConfig) -> str:
    """YAML that :func:`load_config` reads."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Writes tuples as lists on one line."""


_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


def load_config(path: Path, base: RunConfig | None = None) -> RunConfig:
    """Read a YAML file over ``base`` (default: the fields' own defaults). Sections and fields may be left out.

    Raises:
        ConfigError: no such file, no YAML, an unknown section or field, or a value that is not allowed.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    return _build(RunConfig, content, base or RunConfig(), str(path), "")


def _build(cls: type[T], content: Any, base: T, source: str, prefix: str) -> T:
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: {prefix.rstrip('.') or 'the file'}: given {content!r}, allowed fields and values")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in hints:
            full = [f"{prefix}{allowed}" for allowed in hints]
            raise ConfigError(f"{source}: {unknown_name('field', f'{prefix}{name}', full)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _build(cast(Any, hint), value, getattr(base, name), source, f"{prefix}{name}.")
        else:
            values[name] = _typed(hint, value, f"{source}: {prefix}{name}")
    return dataclasses.replace(base, **values)  # type: ignore[type-var]


def _typed(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint``: YAML gives 1e-4 as text and tuples as lists."""
    if get_origin(hint) is Literal:
        return value  # the section checks it, with the list of what is allowed
    if get_origin(hint) is types.UnionType:
        return None if value is None else _typed(get_args(hint)[0], value, where)
    if get_origin(hint) is tuple:
        if isinstance(value, list) and len(value) == len(get_args(hint)):
            return tuple(_typed(inner, item, where) for inner, item in zip(get_args(hint), value, strict=True))
        raise ConfigError(f"{where}: given {value!r}, allowed a list of {len(get_args(hint))}")
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if hint is bool:
        return value if isinstance(value, bool) else SWITCH.get(str(value).lower(), value)  # the section checks it
    if type(value) is not hint:
        raise ConfigError(f"{where}: given {value!r}, allowed a value of type {hint.__name__}")
    return value


def _allow(field: str, given: Any, right: bool, allowed: str) -> None:
    if not right:
        raise ConfigError(f"{field}: given {given!r}, allowed {allowed}")


def _booleans(section: str, config: Any) -> None:
    for field in dataclasses.fields(config):
        if isinstance(field.default, bool) and not isinstance(given := getattr(config, field.name), bool):
            raise ConfigError(f"{section}.{field.name} must be on or off (true or false), got {given!r}")


def _at_least(section: str, config: Any, **limits: float) -> None:
    for name, limit in limits.items():
        value = getattr(config, name)
        _allow(f"{section}.{name}", value, value >= limit, f"{limit} or more")


def _one_of(field: str, given: str, allowed: Any) -> None:
    if given not in allowed:
        raise ConfigError(f"{field}: {unknown_name('name', str(given), allowed)}")
