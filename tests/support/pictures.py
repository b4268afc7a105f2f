"""Small collections of images in each form that is read, and a tiny autoencoder for them."""

import functools
import io
import json
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from erd_fast.files import make_folder

COUNT = 48
_MODES: tuple[tuple[str, str, str], ...] = (("RGB", "jpeg", "jpg"), ("L", "png", "png"), ("RGBA", "png", "png"))


@functools.cache
def _photographs() -> dict[str, Image.Image]:
    """Those of scikit-learn: {"china": ..., "flower": ...}, 640 x 427."""
    from sklearn.datasets import load_sample_images

    found = load_sample_images()
    return {
        Path(name).stem: Image.fromarray(pixels) for name, pixels in zip(found.filenames, found.images, strict=True)
    }


def pictures(count: int = COUNT, side: int = 200) -> Iterator[tuple[str, int, bytes]]:
    """(name, class, file) of pieces of two photographs: wide and high ones, with colours, grey, or with transparency,
    about ``side`` pixels high."""
    for number in range(count):
        label = number % 2
        name, photograph = sorted(_photographs().items())[label]
        width, height = side + 37 * (number % 4), side + 23 * (number % 3)
        left, top = (number * 53) % (640 - width), (number * 29) % (427 - height)
        mode, form, suffix = _MODES[number % 12 % 7 % 3 if number % 4 == 3 else 0]
        piece = photograph.crop((left, top, left + width, top + height)).convert(mode)
        if mode == "RGBA":
            piece.putalpha(piece.getchannel("R"))
        file = io.BytesIO()
        piece.save(file, format=form, quality=90)
        yield f"{name}/{number:04d}.{suffix}", label, file.getvalue()


def image_folder(path: Path, **which: int) -> None:
    """A folder for each class."""
    for name, _, content in pictures(**which):
        make_folder((path / name).parent)
        (path / name).write_bytes(content)


def image_zip(path: Path, **which: int) -> None:
    """The folder, as a zip file with dataset.json."""
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for name, label, content in pictures(**which):
            labels.append([name, label])
            archive.writestr(name, content)
        archive.writestr("dataset.json", json.dumps({"labels": labels}))


def webdataset(path: Path, **which: int) -> None:
    """Two tar files, written by the library webdataset."""
    import webdataset as wds

    make_folder(path)
    everything = sorted(pictures(**which))
    half = -(-len(everything) // 2)
    for shard, part in enumerate((everything[:half], everything[half:])):
        with wds.TarWriter(str(path / f"images-{shard:04d}.tar"), mtime=0) as writer:
            for name, label, content in part:
                key, _, suffix = name.replace("/", "-").rpartition(".")
                writer.write({"__key__": key, suffix: content, "cls": label})


def parquet(path: Path, **which: int) -> None:
    """As a data set of Hugging Face's hub, in row groups of ten."""
    import pyarrow
    import pyarrow.parquet

    rows = sorted(pictures(**which))
    table = pyarrow.table(
        {
            "image": [{"bytes": content, "path": name} for name, _, content in rows],
            "label": pyarrow.array([label for _, label, _ in rows], pyarrow.int64()),
        }
    )
    described = {"info": {"features": {"label": {"names": ["china", "flower"], "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
    pyarrow.parquet.write_table(table, path, row_group_size=10)


def tar_of_tars(path: Path, **which: int) -> None:
    """The form of ILSVRC2012_img_train.tar: a tar file for each class in one."""
    inner: dict[str, io.BytesIO] = {}
    archives: dict[str, tarfile.TarFile] = {}
    for name, _, content in pictures(**which):
        folder, _, file = name.partition("/")
        if folder not in archives:
            inner[folder] = io.BytesIO()
            archives[folder] = tarfile.open(fileobj=inner[folder], mode="w")  # noqa: SIM115
        add_to_tar(archives[folder], file, content)
    with tarfile.open(path, "w") as outer:
        for folder, archive in reversed(archives.items()):  # in no order, as classes may come
            archive.close()
            add_to_tar(outer, f"{folder}.tar", inner[folder].getvalue())


def add_to_tar(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


COLLECTIONS: dict[str, Callable[..., None]] = {
    "images": image_folder,
    "images.zip": image_zip,
    "images-webdataset": webdataset,
    "images.parquet": parquet,
    "imagenet.tar": tar_of_tars,
}


def tiny_vae(path: Path, size: int = 256, count: int = COUNT, channels: int = 4) -> None:
    """An AutoencoderKL with Stable Diffusion's form and a few random parameters, whose scaling factor gives the latents
    of :func:`pictures` a std of 1."""
    from erd_fast.data.pictures import decode

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what else diffusers could be installed with
        from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = 4
        make: Any = AutoencoderKL
        model = make(
            down_block_types=["DownEncoderBlock2D"] * blocks,
            up_block_types=["UpDecoderBlock2D"] * blocks,
            block_out_channels=[8] * blocks,
            layers_per_block=1,
            latent_channels=channels,
            norm_num_groups=4,
            sample_size=size,
        ).eval()
    with torch.no_grad():
        model.quant_conv.bias[channels:] -= 6  # log-variance: that of a trained one is small
    pixels = np.stack([decode(content, size) for _, _, content in pictures(count)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        means = torch.cat([model.encode(part).latent_dist.mean for part in images.split(16)])
    model.register_to_config(scaling_factor=1 / float(means.std()))
    model.save_pretrained(path, safe_serialization=True)
