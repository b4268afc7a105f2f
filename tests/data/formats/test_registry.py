"""data import: every format on the command line, what its numbers then mean, and what every format refuses."""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from erd_fast.cli import main
from erd_fast.data import LatentStore
from erd_fast.data.check import check_scale
from erd_fast.data.formats.registry import FORMATS, open_source
from erd_fast.data.formats.source import ROWS_AT_ONCE, ImportOptions
from erd_fast.errors import ConfigError
from support import foreign
from support.fixtures import celeba_folder

SD = foreign.SD_SCALE


class Case(NamedTuple):
    """A data set, the options it needs, and what its manifest must say."""

    make: Callable[..., None]
    options: tuple[str, ...] = ()
    src: str = "src"
    kind: str = "mean_std"
    scale: tuple[float, ...] = SD
    shift: tuple[float, ...] = ()
    vae: str = ""
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    flip: str = "none"


PICKLE = ("--allow-pickle",)
SD_MSE = "stabilityai/sd-vae-ft-mse"
EDM2 = {
    "make": foreign.edm2,
    "vae": SD_MSE,
    "pixel_range": (0.0, 1.0),
    "scale": foreign.EDM2_SCALE,
    "shift": foreign.EDM2_SHIFT,
}
CASES = {
    "erd-hdf5": Case(foreign.erd_hdf5, src="erd.h5"),
    "fast-dit": Case(foreign.fast_dit, kind="sample"),
    "uvit": Case(foreign.uvit, PICKLE, kind="mean_logvar", flip="stored"),
    "maskdit-lmdb": Case(foreign.maskdit_lmdb, kind="mean_logvar", flip="stored"),
    "maskdit-webdataset": Case(foreign.maskdit_webdataset, PICKLE, kind="mean_logvar"),
    "edm2": Case(src="edm2.zip", **EDM2),
    "edm2 folder": Case(**EDM2),
    "repa": Case(foreign.repa, vae=SD_MSE),
    "lightningdit": Case(
        foreign.lightningdit, PICKLE, kind="sample", scale=(0.5,) * 8, shift=tuple(range(8)), flip="stored"
    ),
    "numpy": Case(foreign.numpy_folder, ("--kind", "sample"), kind="sample", scale=()),
}


@pytest.fixture(params=CASES)
def case(request) -> tuple[str, Case]:
    return request.param.split()[0], CASES[request.param]


def model_inputs(store: LatentStore) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(means or samples, stds or None) as a model sees them, from the manifest alone."""
    manifest = store.manifest
    channels = manifest.shape[0]
    scale = torch.tensor(manifest.scale or (1.0,) * channels)[:, None, None]
    shift = torch.tensor(manifest.shift or (0.0,) * channels)[:, None, None]
    rows = store.gather(torch.arange(len(store))).float()
    second = {"mean_std": lambda x: x, "mean_logvar": lambda x: (x / 2).exp()}.get(manifest.kind)
    return (rows[:, :channels] - shift) * scale, second and second(rows[:, channels:]) * scale


def test_every_format_of_latents_is_a_case():
    assert {name.split()[0] for name in CASES} | {"celeba", "images"} == FORMATS.keys()


def test_each_format_becomes_a_store_that_says_what_its_numbers_mean(case, tmp_path, capsys):
    name, case = case
    src, dst = tmp_path / case.src, tmp_path / "store"
    case.make(src)
    main(["data", "import", name, str(src), str(dst), *case.options])
    store = LatentStore(dst, verify=True)
    manifest = store.manifest
    assert manifest.scale == pytest.approx(case.scale, rel=1e-6) and manifest.shift == pytest.approx(case.shift)
    for field in ("kind", "vae", "pixel_range", "flip"):
        assert getattr(manifest, field) == getattr(case, field), field
    assert manifest.vae_source == case.vae
    assert (manifest.dtype, manifest.num_classes) == ("float16", 10)
    known = "" if name == "maskdit-webdataset" else f"{len(store)} samples of "
    first, progress, last = capsys.readouterr().out.splitlines()
    assert (first, last) == (
        f"importing {known}{src}",
        f"wrote {dst}: {len(store)} samples, {manifest.kind} {manifest.shape}",
    )
    assert re.fullmatch(rf"importing {len(store)}({'' if not known else f'/{len(store)}'})  \S+ samples/s.*", progress)
    values, stds = model_inputs(store)
    # 6,144 normal numbers at least: the std is off by 0.01, and so is the mean.
    assert 0.9 < float(values.std()) < 1.1 and abs(float(values.mean())) < 0.1
    # Half a step of float16 below 8, 2^-9, of a log-variance is half as much of the std.
    assert stds is None or torch.allclose(stds, torch.tensor(foreign.SPREAD), rtol=2**-10 + 2**-20)
    check_scale(store)


def test_rows_come_in_order_and_in_parts(case, tmp_path, imported):
    """More than one part of each; a row's label tells which it is."""
    name, case = case
    count = 2 * ROWS_AT_ONCE + 8
    classes = count // 2 if case.flip == "stored" and name != "lightningdit" else count
    src = tmp_path / case.src
    case.make(src, count, 1)
    options = {"--allow-pickle": {"allow_pickle": True}, "--kind": {"kind": "sample"}}
    taken = options[case.options[0]] if case.options else {}
    for latents, labels in open_source(name, src, ImportOptions(**taken)).batches:
        assert 0 < len(latents) == len(labels) <= ROWS_AT_ONCE
    values, _ = model_inputs(store := imported(name, src, **taken))
    channels = store.manifest.shape[0]
    truth = torch.from_numpy(foreign.samples(classes, 1, (1.0,) * channels, (0.0,) * channels))
    order = ORDERS.get(name, torch.arange)(count)
    # Four roundings of numbers of up to 30 / 3, shift included; or half a step of float16 below 8, as the fixture has.
    tolerance = 2**-9 if name == "numpy" else 4 * 10 * 2**-24
    assert torch.allclose(values, truth[order], atol=tolerance)
    assert store.labels.tolist() == foreign.labels_of(classes)[order].tolist()


def as_text(count: int) -> torch.Tensor:
    return torch.tensor(sorted(range(count), key=str))


def flips_after_each(size: int, count: int) -> torch.Tensor:
    return torch.cat([part.repeat(2) for part in torch.arange(count // 2).split(size)])


def flips_after_each_shard(count: int) -> torch.Tensor:
    return torch.cat([part.repeat(2) for part in torch.arange(count).chunk(3)])


ORDERS: dict[str, Callable[[int], torch.Tensor]] = {
    "fast-dit": as_text,
    "uvit": functools.partial(flips_after_each, 8),
    "maskdit-lmdb": lambda count: torch.arange(count // 2).repeat(2),
    "lightningdit": flips_after_each_shard,
}


def test_help_explains_every_format_in_a_line_and_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as ended:
        main(["data", "import", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for name, known in FORMATS.items():
        assert f"\n{name}: {known.about}\n" in out
    for field in dataclasses.fields(ImportOptions):
        assert f"--{field.name.replace('_', '-')}" in out


OTHER_VALUES = {
    "dtype": "float32",
    "num_classes": 3,
    "vae": "x",
    "scale": (1.0,),
    "shift": (1.0,),
    "allow_pickle": True,
    "split": "val",
    "kind": "sample",
    "flip": "stored",
    "labels": Path("x"),
    "multiplier": 2.0,
    "size": 32,
    "partition": Path("x"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_an_option_that_a_format_has_no_use_for_is_refused(name, refused, tmp_path):
    for field in dataclasses.fields(ImportOptions):
        if field.name not in FORMATS[name].takes:
            message = refused(name, tmp_path, ConfigError, **{field.name: OTHER_VALUES[field.name]})
            takers = [other for other, known in FORMATS.items() if field.name in known.takes]
            assert message.startswith(f"{field.name}: given {OTHER_VALUES[field.name]}, which {name} has no use for")
            assert message.endswith(f"formats that have: {', '.join(takers)}") and takers


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("erd-h5 src out/store", 2, r"unknown format 'erd-h5' \(did you mean 'erd-hdf5'\?\); allowed: erd-hdf5, fast"),
        ("repa none out/store", 1, "none does not exist"),
        ("repa src out/store", 1, r"src has no dataset\.json, allowed a folder or zip file with it"),
        ("repa src src", 1, "src exists already"),
        ("repa good good", 1, "good exists already; stores are never changed, so name a new folder"),
        ("repa good out/store --num-classes 0", 2, "num_classes: given 0, allowed 1 or more"),
        ("repa good out/store --num-classes 9", 1, "good: given label 9 of sample 22, allowed 0 to 8"),
        ("repa good out/store --split val", 2, "split: given val, which repa has no use for; formats that have: erd-"),
        ("uvit good out/store", 2, "allow_pickle: the files of uvit are pickles"),
        ("repa good good/file/store", 1, "cannot create the folder good/file: "),
    ],
)
def test_a_mistake_is_one_message(arguments, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    foreign.repa(tmp_path / "good")
    (tmp_path / "good" / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(["data", "import", *arguments.split()])
    error = capsys.readouterr().err
    assert ended.value.code == status
    assert re.match(f"erd-fast: error: {message}", error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_celeba_is_pixels_without_classes(imported, tmp_path):
    celeba_folder(tmp_path / "faces", count=3)
    manifest = imported("celeba", tmp_path / "faces").manifest
    assert (manifest.kind, manifest.dtype, manifest.num_classes, manifest.flip) == ("pixels", "uint8", 0, "mirror")


@pytest.mark.parametrize(
    ("name", "module"),
    [("erd-hdf5", "h5py"), ("maskdit-lmdb", "lmdb"), ("maskdit-webdataset", "webdataset")],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(name, module, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    monkeypatch.delitem(__import__("sys").modules, f"{module}.tariterators", raising=False)
    pickles = {"allow_pickle": True} if name == "maskdit-webdataset" else {}
    message = refused(name, tmp_path, ConfigError, **pickles)
    assert message == f"{name}: {module} is not installed: pip install 'erd-fast[formats]'"


def test_samples_are_normal_and_labels_are_sorted():
    """What the other tests of this folder lean on."""
    rows = foreign.samples(50, 8, (0.5,) * 4, (3.0,) * 4)
    assert rows.shape == (50, 4, 8, 8) and abs(rows.mean() - 3) < 0.05 and abs(rows.std() - 2) < 0.05
    assert np.array_equal(np.unique(foreign.labels_of(50)), np.arange(10))
