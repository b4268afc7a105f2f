"""preview: pictures and scores of the averaged weights."""

import numpy as np
import pytest
import torch
from PIL import Image

from erd_fast.data import open_reader, write_store
from erd_fast.sampling.images import grid, to_pixels
from erd_fast.training import preview
from erd_fast.training.preview import judge_samples, preview_decoder, spread_labels, why_not_judged, write_preview
from erd_fast.training.sample_run import sample_run


@pytest.fixture
def step(make_step, tiny, digits):
    step = make_step(tiny(optim={"lr": 1e-2}))
    batches = open_reader(digits, "resident", torch.device("cpu")).batches(step.plan, 0)
    for _ in range(4):
        step(batches)
    return step


def test_labels_are_spread_over_the_classes():
    assert spread_labels(5, 0) is None
    assert spread_labels(23, 10).bincount().tolist() == [3] * 3 + [2] * 7
    assert spread_labels(4, 1000).tolist() == [0, 250, 500, 750]
    assert spread_labels(10, 10).tolist() == list(range(10))


def test_a_preview_is_a_grid_of_40_images_of_the_averages(tmp_path, step, digits):
    config = step.config
    write_preview(config, step, digits, to_pixels, tmp_path / "samples" / "one.png")
    picture = np.asarray(Image.open(tmp_path / "samples" / "one.png"))
    assert picture.shape == (4 * 66 + 2, 10 * 66 + 2)  # 8 x 8 enlarged to 64 x 64, with gaps
    assert len(np.unique(picture)) > 10
    with torch.no_grad():
        for parameter in step.model.parameters():
            parameter.add_(1.0)
    write_preview(config, step, digits, to_pixels, tmp_path / "two.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "two.png")), picture)
    with torch.no_grad():
        for parameter in step.model.parameters():
            step.optimizer.state[parameter]["ema"].mul_(1.5)
    write_preview(config, step, digits, to_pixels, tmp_path / "three.png")
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "three.png")), picture)


def test_samples_are_judged_with_the_labels_they_were_asked_for(step, tiny, digits, monkeypatch):
    class Judge:
        holdout_accuracy = 0.75

        def score(self, images, labels):
            assert images.shape == (23, 1, 8, 8) and images.dtype == torch.uint8
            assert torch.equal(labels, torch.arange(23) % 10)
            return {"class_accuracy": 0.5, "fd_classifier": 2.0}

    def get_judge(images, labels, num_classes, fingerprint):
        assert torch.equal(images, digits.gather(torch.arange(1797))) and torch.equal(labels, digits.labels)
        assert (num_classes, fingerprint) == (10, digits.fingerprint)
        return Judge()

    monkeypatch.setattr(preview, "get_judge", get_judge)
    scores = judge_samples(tiny(eval={"images": 23}), step, digits)
    assert scores == {"class_accuracy": 0.5, "fd_classifier": 2.0, "judge_holdout_accuracy": 0.75}


def test_pixels_with_classes_can_be_judged(tmp_path, digits):
    labels, pixels = torch.arange(120) % 2, torch.zeros(120, 1, 8, 8).byte()
    without = write_store(tmp_path / "a", [(pixels, labels * 0)], kind="pixels", num_classes=0)
    latents = write_store(tmp_path / "b", [(pixels.float(), labels)], kind="sample", num_classes=2)
    few = write_store(tmp_path / "c", [(pixels[:99], labels[:99])], kind="pixels", num_classes=2)
    large = write_store(tmp_path / "d", [(pixels.repeat(1, 1, 1, 9), labels)], kind="pixels", num_classes=2)
    assert why_not_judged(digits) is None
    assert [why_not_judged(store).split()[3] for store in (without, latents, few, large)] == ["a", "a", "for", "for"]


def test_pixels_that_are_grey_or_coloured_are_pictures(tmp_path, digits):
    assert preview_decoder(digits.manifest) is to_pixels
    for channels, decoder in ((2, None), (3, to_pixels)):
        batch = torch.zeros(4, channels, 8, 8).byte(), torch.zeros(4).long()
        store = write_store(tmp_path / str(channels), [batch], kind="pixels", num_classes=0)
        assert preview_decoder(store.manifest) is decoder


def test_a_preview_of_latents_is_a_grid_of_decoded_images(latent_run):
    """That of the last step shows what the checkpoint of that step draws from the same noise."""
    names = sorted(path.name for path in (latent_run / "samples").iterdir())
    assert names == ["step-00000002.png", "step-00000003.png"]
    pixels, _ = sample_run(latent_run, 40, steps=2)
    assert len(np.unique(pixels)) > 50
    expected = np.asarray(grid(pixels), np.int16)
    found = np.asarray(Image.open(latent_run / "samples" / names[-1]), np.int16)
    assert found.shape == (4 * 66 + 2, 10 * 66 + 2, 3) and np.abs(found - expected).max() <= 1
