"""Samples as pictures: numbers of images, pixels, grids and files."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from erd_fast.diffusion import get_schedule
from erd_fast.errors import ConfigError, RunError
from erd_fast.random import Purpose, Stream, normals
from erd_fast.sampling import heun
from erd_fast.sampling.images import check_output, generate, grid, prepare_output, save, to_latents, to_pixels


class _PerImage(nn.Module):
    """Works on every element alone, so that rounding cannot depend on the batch."""

    in_channels, input_size, num_classes, null_label = 2, 4, 10, True

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.batches = []

    def forward(self, x, t, y):
        self.batches.append(len(x))
        return self.scale * x if y is None else self.scale * x * (1 + y.view(-1, 1, 1, 1))


def _generate(count: int, labels: torch.Tensor | None = None, **how) -> torch.Tensor:
    schedule = get_schedule("cosine")
    return generate(_PerImage(), schedule, "eps", labels, count, **{"seed": 4, "steps": 3, **how})


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_images_do_not_depend_on_the_batch_size(batch_size, cfg_scale):
    labels = torch.arange(7)
    whole = _generate(7, labels, batch_size=7, cfg_scale=cfg_scale)
    assert torch.equal(_generate(7, labels, batch_size=batch_size, cfg_scale=cfg_scale), whole)
    assert torch.equal(_generate(3, labels[:3], cfg_scale=cfg_scale), whole[:3])  # nor on how many follow


def test_batches_are_no_larger_than_asked():
    model = _PerImage()
    generate(model, get_schedule("cosine"), "eps", None, 7, seed=0, batch_size=3, steps=1)
    assert model.batches == [3, 3, 1]


def test_images_come_from_the_noise_of_their_numbers():
    noise = normals(4, Purpose.SAMPLE, Stream.NOISE, torch.arange(5), (2, 4, 4))
    expected = heun(_PerImage(), get_schedule("cosine"), "eps", noise, steps=3)
    assert torch.equal(_generate(5, batch_size=2), expected)
    assert not torch.equal(_generate(5, seed=5), expected)


def test_pixels_of_every_level_come_back():
    levels = torch.arange(256)
    x = (2.0 * levels - 255.0) / 255.0  # as q_sample reads pixels
    found = to_pixels(x.view(1, 1, 16, 16))
    assert found.dtype == np.uint8 and found.flatten().tolist() == levels.tolist()


def test_pixels_beyond_the_range_are_clipped_and_the_middle_is_grey():
    x = torch.tensor([-1.0, 1.0, -1.001, 1.001, -1e9, 1e9, 0.0]).view(1, 1, 1, 7)
    assert to_pixels(x).flatten().tolist() == [0, 255, 0, 255, 0, 255, 128]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pixels_have_channels_last(dtype):
    x = torch.stack((torch.full((2, 3), -1.0), torch.zeros(2, 3), torch.ones(2, 3)))[None].to(dtype)
    found = to_pixels(x)
    assert found.shape == (1, 2, 3, 3) and (found == np.array([0, 128, 255])).all()


def test_latents_are_what_scale_and_shift_were_applied_to():
    x = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    scale, shift = [0.5, 4.0], [1.0, -3.0]
    scaled = (to_latents(x, scale, shift) - torch.tensor(shift).view(2, 1, 1)) * torch.tensor(scale).view(2, 1, 1)
    torch.testing.assert_close(scaled, x, rtol=0, atol=4 * 2**-24 * 4 * 3)  # two roundings of up to 3, times 4
    assert torch.equal(to_latents(x, scale, []), x / torch.tensor(scale).view(2, 1, 1))
    assert torch.equal(to_latents(x.bfloat16(), [], []), x.bfloat16().float())


# 8 pixels are enlarged 8 times to reach 64, of 20 four times; 80 stay as they are, and the longer side counts.
@pytest.mark.parametrize(
    ("height", "width", "factor"), [(8, 8, 8), (20, 20, 4), (63, 63, 2), (64, 64, 1), (80, 80, 1), (4, 16, 4)]
)
@pytest.mark.parametrize(
    ("count", "columns", "rows", "across"), [(1, 10, 1, 1), (5, 3, 2, 3), (6, 3, 2, 3), (4, 1, 4, 1)]
)
def test_grid_holds_every_image_in_its_place(height, width, factor, count, columns, rows, across):
    pixels = np.random.default_rng(0).integers(0, 250, (count, height, width, 3), dtype=np.uint8)  # white is the paper
    sheet = np.array(grid(pixels, columns))
    tall, wide = height * factor + 2, width * factor + 2
    assert sheet.shape == (rows * tall + 2, across * wide + 2, 3)
    inked = np.zeros(sheet.shape, bool)
    for number, image in enumerate(pixels):
        top, left = 2 + number // across * tall, 2 + number % across * wide
        place = (slice(top, top + height * factor), slice(left, left + width * factor))
        expected = np.kron(image, np.ones((factor, factor, 1), np.uint8))  # nearest neighbour: blocks of one colour
        assert np.array_equal(sheet[place], expected)
        inked[place] = True
    assert (sheet[~inked] == 255).all()


def _pixels(channels: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (3, 5, 6, channels), dtype=np.uint8)


def test_npz_holds_images_and_labels_by_the_names_of_adm(tmp_path):
    labels = np.array([7, 0, 2])
    save(_pixels(), labels, tmp_path / "new" / "x.npz")
    save(_pixels(), None, tmp_path / "unlabelled.npz")
    with np.load(tmp_path / "new" / "x.npz") as found:
        assert set(found) == {"arr_0", "arr_1"}
        assert np.array_equal(found["arr_0"], _pixels()) and found["arr_0"].dtype == np.uint8
        assert np.array_equal(found["arr_1"], labels)
    with np.load(tmp_path / "unlabelled.npz") as found:
        assert set(found) == {"arr_0"}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_holds_one_png_an_image(tmp_path, channels):
    pixels = _pixels(channels)
    save(pixels, None, tmp_path / "samples")
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    for file, image in zip(files, pixels, strict=True):
        assert np.array_equal(np.array(Image.open(file)), image[:, :, 0] if channels == 1 else image)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_grid(tmp_path, channels):
    save(_pixels(channels), None, tmp_path / "x.png", columns=2)
    with Image.open(tmp_path / "x.png") as found:
        assert found.mode == ("L" if channels == 1 else "RGB")
        assert np.array_equal(np.array(found), np.array(grid(_pixels(channels), columns=2)))


@pytest.mark.parametrize("name", ["x.jpg", "x.npy", "x.PNGs"])
def test_other_endings_are_refused_before_anything_is_written(tmp_path, name):
    out = tmp_path / "new" / name
    for write in (check_output, lambda path: save(_pixels(), None, path)):
        with pytest.raises(ConfigError, match=r"allowed a name ending in .png or .npz, or a folder"):
            write(out)
    assert not out.parent.exists()


def test_what_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        save(_pixels(), None, tmp_path / "file" / "x.png")
    (tmp_path / "y.png").mkdir()
    with pytest.raises(RunError, match=r"^out must be a file, got the folder .*y\.png$"):
        prepare_output(tmp_path / "y.png")
