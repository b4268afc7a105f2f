"""The command line: parse, build, call. What the commands do lives in the modules they call."""

import dataclasses
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import erd_fast
from erd_fast.data.formats.registry import describe_formats
from erd_fast.data.formats.source import ImportOptions
from erd_fast.errors import ConfigError, ErdFastError
from erd_fast.prepare.encode import EncodeOptions
from erd_fast.sampling import GuidanceInterval
from erd_fast.sampling.guidance import GuidanceUnit
from erd_fast.training.config import SWITCH, RunConfig, load_config
from erd_fast.training.presets import describe_presets, get_preset

_DESCRIPTION = """Train diffusion transformers on image latents with the ERD loss weighting.

Options may be written with - or _. `erd-fast --version` prints the version."""

_IMPORT = f"Make a latent store of a data set in a format of others.\n\nFormats:\n\n{describe_formats()}"


@dataclasses.dataclass(frozen=True)
class Train:
    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET")]
    """Name of a preset."""
    config: Path | None = None
    """YAML file whose fields replace the preset's."""
    out: Path | None = None
    """Run folder; default runs/PRESET. The same command again resumes."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print configuration and size of the run, and stop."""
    profile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write where the time of a few steps went into the run folder's profile/: a trace, a table of kernels."""
    run: tyro.conf.FlagConversionOff[Annotated[RunConfig, tyro.conf.arg(name="")]] = dataclasses.field(
        default_factory=RunConfig
    )

    def __call__(self) -> None:
        from erd_fast.report import write_report
        from erd_fast.training.build import describe
        from erd_fast.training.loop import train

        if self.dry_run:
            print(describe(self.run))
            return
        folder = self.out or Path("runs") / self.preset
        if train(self.run, folder, profile=self.profile) is not None:
            print(f"report: {write_report(folder)}")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw samples from a run's newest checkpoint, or from one checkpoint."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN|CHECKPOINT")]
    """Run folder, or a folder checkpoints/step-XXXXXXXX."""
    out: Path
    """x.png: a grid; x.npz: arr_0 images (N, H, W, C) uint8 and arr_1 labels; anything else: a folder of PNGs. With
    --vae none a run on latents takes x.npz only: arr_0 latents (N, C, H, W) float32, scale and shift undone."""
    vae: Annotated[
        str,
        tyro.conf.arg(metavar="PATH|ID|none", help_behavior_hint="(default: the recorded one, from local files only)"),
    ] = ""
    """Autoencoder to decode a run on latents with: a folder, or a Hugging Face hub ID, which may be downloaded; none
    writes latents."""
    n: int = 100
    """Number of images."""
    classes: tuple[int, ...] = ()
    """Labels to cycle through; none spreads over all classes."""
    steps: int = 50
    """Heun steps; each but the last evaluates the model twice."""
    cfg_scale: float = 1.0
    """Classifier-free guidance scale; 1 is off."""
    guidance_interval: tuple[float, float] | None = None
    """LO HI: guide within these noise levels alone."""
    guidance_unit: GuidanceUnit = "frac"
    """Unit of the interval: fraction of the training time, model time, sigma, or sampler step."""
    seed: int = 0
    """Image i depends on the seed, i and its label alone."""
    ema: bool = True
    """Averaged weights."""

    def __call__(self) -> None:
        from erd_fast.sampling.images import check_output, prepare_output, save
        from erd_fast.training.sample_run import find_checkpoint, open_decoder, sample_run

        check_output(self.out)
        interval = GuidanceInterval(*self.guidance_interval, self.guidance_unit) if self.guidance_interval else None
        checkpoint = find_checkpoint(self.source)
        decode = open_decoder(checkpoint, self.vae, pictures=self.out.suffix != ".npz")
        prepare_output(self.out)
        samples, labels = sample_run(
            checkpoint,
            self.n,
            decode=decode,
            classes=self.classes,
            steps=self.steps,
            cfg_scale=self.cfg_scale,
            guidance_interval=interval,
            seed=self.seed,
            ema=self.ema,
        )
        save(samples, labels, self.out)
        print(f"wrote {self.out}: {len(samples)} samples, {samples.dtype} {samples.shape[1:]}")


@dataclasses.dataclass(frozen=True)
class Encode:
    """Encode images into a latent store. The same command goes on where it was stopped; torchrun shares the work.

    SRC is a folder of images, in a folder for each class or without classes; a .zip of the same form; WebDataset .tar
    files with key.jpg and key.cls, or a folder of them; a .tar of .tar files, each of which is a class
    (ILSVRC2012_img_train.tar as it comes); .parquet files with columns image and label, or a folder of them.
    """

    src: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """The images."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder to make."""
    vae: str
    """AutoencoderKL of diffusers: a folder, or a name on the Hugging Face hub (stabilityai/sd-vae-ft-mse)."""
    options: Annotated[EncodeOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=EncodeOptions)

    def __call__(self) -> None:
        from erd_fast.prepare.encode import encode

        if (store := encode(self.src, self.dst, self.vae, self.options)) is not None:
            print(f"wrote {store.path}: {len(store):,} samples, {store.manifest.kind} {store.manifest.shape}")


@dataclasses.dataclass(frozen=True)
class Import:
    format: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FORMAT")]
    """What SRC is: a name from the list above."""
    src: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """File or folder of the data set."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder to make."""
    options: tyro.conf.FlagCreatePairsOff[Annotated[ImportOptions, tyro.conf.arg(name="")]] = dataclasses.field(
        default_factory=ImportOptions
    )

    def __call__(self) -> None:
        from erd_fast.data.importers import import_dataset

        store = import_dataset(self.format, self.src, self.dst, self.options)
        print(f"wrote {store.path}: {len(store):,} samples, {store.manifest.kind} {store.manifest.shape}")


@dataclasses.dataclass(frozen=True)
class StoreInfo:
    """What a latent store holds."""

    store: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STORE")]
    """Folder of the store."""

    def __call__(self) -> None:
        from erd_fast.data import LatentStore

        print(LatentStore(self.store).describe())


@dataclasses.dataclass(frozen=True)
class Check:
    """Is a latent store what its manifest says, and fit to train on? Reads all of it; exit status 1 if it is not."""

    store: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STORE")]
    """Folder of the store."""
    picture: Path | None = None
    """PNG file for histograms of its numbers; default STORE-check.png, beside the store."""

    def __call__(self) -> None:
        from erd_fast.data.check import check_store

        check_store(self.store, self.picture)


@dataclasses.dataclass(frozen=True)
class Data:
    """Make latent stores, and look at them."""

    action: tyro.conf.OmitArgPrefixes[
        Annotated[Encode, tyro.conf.subcommand("encode")]
        | Annotated[Import, tyro.conf.subcommand("import", description=_IMPORT)]
        | Annotated[Check, tyro.conf.subcommand("check")]
        | Annotated[StoreInfo, tyro.conf.subcommand("info")]
    ]

    def __call__(self) -> None:
        self.action()


@dataclasses.dataclass(frozen=True)
class Report:
    """Write a run's report.html: one self-contained page."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""

    def __call__(self) -> None:
        from erd_fast.report import write_report

        print(f"report: {write_report(self.run)}")


@dataclasses.dataclass(frozen=True)
class Lab:
    """Run an experiment of the paper's laboratory: pictures, tables and a page.

    weights: every weighting on every target and schedule, with the identities between them (2 CPU cores: 20 seconds).
    """

    experiment: tyro.conf.Positional[Literal["weights"]]
    """Which one."""
    out: Path
    """Folder for what it writes."""

    def __call__(self) -> None:
        from erd_fast.lab.weights import write_weights

        for path in write_weights(self.out):
            print(f"wrote {path}")


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure throughput beside eager PyTorch and torch.compile.

    ops: each op on each backend that is here, the ops of a step together, blocks and whole models. A backend is checked
    before it is timed; all variants of a case are timed in turn (2 CPU cores: 5 to 7 minutes). --filter calls measures
    the overhead of single calls on a CPU and names the ratios above their limits.
    attention: PyTorch's, flash-attn's where they are installed, and ours, on the sequences of the models.
    step: whole training steps beside those that people write, and ours with pieces switched off (2 CPU cores: 3 to 7
    minutes).
    data: reading latents by each reader, by a DataLoader of NumPy files and from HDF5 (2 CPU cores: 2 minutes).
    """

    what: tyro.conf.Positional[Literal["ops", "attention", "step", "data"]]
    """What to measure."""
    filter: str = ""
    """Only cases whose name contains this: N=64, "q_sample drawn", model/DiT-S/2; without it the usual ones."""
    json: Path | None = None
    """File for the results with the machine they were measured on; of step and data there is a picture beside it."""
    seconds: float | None = None
    """Time for each variant of each case: 0.3 of ops and attention, 5 of step, 4 of data."""

    def __call__(self) -> None:
        from erd_fast.benchmark.command import measure

        measure(self.what, self.filter, self.seconds, self.json)


@dataclasses.dataclass(frozen=True)
class Info:
    """What is installed, which backend each op uses, and why not the others."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """As JSON."""

    def __call__(self) -> None:
        from erd_fast import info

        print(json.dumps(info.collect(), indent=2) if self.json else info.describe())


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``erd-fast``. Mistakes end with one message and exit status 2 (configuration) or 1."""
    warnings.formatwarning = lambda message, *_, **__: f"erd-fast: warning: {message}\n"
    try:
        try:
            _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except ErdFastError as error:
        if not error.told:
            print(f"erd-fast: error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    except BrokenPipeError:  # `erd-fast ... | head`: what reads our output has gone, so there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # a folder that may not be searched, a disk that is full
        print(f"erd-fast: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def _run(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        print(f"erd-fast {erd_fast.__version__}")
        return
    split = (word.split("=", 1) if word.startswith("--config=") else [word] for word in arguments)
    arguments = [part for parts in split for part in parts]
    default = _train_default(arguments)
    command: Any = tyro.cli(
        _commands(default),
        args=arguments or ["--help"],
        prog="erd-fast",
        description=_DESCRIPTION,
        registry=_REGISTRY,
    )
    if isinstance(command, Train) and (command.preset, command.config) != (default.preset, default.config):
        raise ConfigError(f"train: name the preset first and --config once: erd-fast train {command.preset} ...")
    command()


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _switch(type_info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Booleans of the configuration are on or off, in the words of SWITCH."""
    if type_info.type is not bool:
        return None

    def read(words: list[str]) -> bool:
        if words[0].lower() not in SWITCH:
            raise ValueError(f"must be on or off (true or false), got {words[0]}")
        return SWITCH[words[0].lower()]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="on|off",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: ["on" if value else "off"],
    )


def _train_default(arguments: list[str]) -> Train:
    """``train`` as the preset and the YAML file that the arguments name make it."""
    preset, run = tyro.MISSING, get_preset("digits")  # unless one is named: --help shows somebody's defaults
    if arguments[:1] == ["train"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        preset, run = arguments[1], get_preset(arguments[1])
    if "--config" not in arguments[1:-1]:
        return Train(preset, run=run)
    file = Path(arguments[arguments.index("--config") + 1])
    return Train(preset, file, run=load_config(file, run))


def _commands(default: Train) -> Any:
    """The subcommands."""
    subcommand = tyro.conf.subcommand
    described = f"Train a preset, or go on training it.\n\nPresets:\n\n{describe_presets()}"
    return (
        Annotated[Train, subcommand("train", default=default, description=described)]
        | Annotated[Sample, subcommand("sample")]
        | Annotated[Report, subcommand("report")]
        | Annotated[Data, subcommand("data")]
        | Annotated[Lab, subcommand("lab")]
        | Annotated[Bench, subcommand("bench")]
        | Annotated[Info, subcommand("info")]
    )


if __name__ == "__main__":
    main()
