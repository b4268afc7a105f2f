"""sample_run: images of a run's newest checkpoint, or of one checkpoint."""

import shutil

import numpy as np
import pytest

from erd_fast.data import write_store
from erd_fast.errors import ConfigError, DataError
from erd_fast.sampling import GuidanceInterval
from erd_fast.training.loop import train
from erd_fast.training.sample_run import sample_run

LABELS = (3, 1, 4, 1, 5)


def _sample(path, count: int = 5, classes=LABELS, steps: int = 3, **how):
    return sample_run(path, count, classes=classes, steps=steps, **how)[0]


def test_a_run_and_its_newest_checkpoint_give_the_same_images(trained):
    pixels, labels = sample_run(trained, 12, steps=3)
    assert pixels.shape == (12, 8, 8, 1) and pixels.dtype == np.uint8
    assert labels.tolist() == [*range(10), 0, 1]
    again, _ = sample_run(trained / "checkpoints" / "step-00000040", 12, steps=3)
    assert np.array_equal(again, pixels)


def test_the_newest_checkpoint_is_that_of_the_largest_step(trained, tmp_path, tiny):
    shutil.copytree(trained, tmp_path / "run")
    train(tiny(train={"steps": 42}, optim={"lr": 1e-2}), tmp_path / "run")
    assert np.array_equal(_sample(tmp_path / "run"), _sample(tmp_path / "run/checkpoints/step-00000042"))
    assert not np.array_equal(_sample(tmp_path / "run"), _sample(tmp_path / "run/checkpoints/step-00000040"))


def test_classes_are_cycled_through(trained):
    _, labels = sample_run(trained, 7, classes=(9, 2), steps=1)
    assert labels.tolist() == [9, 2, 9, 2, 9, 2, 9] and labels.dtype == np.int64


def test_an_image_depends_on_its_number_and_label_and_not_on_how_many(trained):
    many = _sample(trained)
    few = _sample(trained, 3)
    # Matrix products of other sizes round otherwise: a grey level may tip over, no more.
    assert np.abs(few.astype(int) - many[:3]).max() <= 1
    other = _sample(trained, classes=(3, 1, 4, 2, 5)).astype(int)
    same = [np.abs(one - two).max() <= 1 for one, two in zip(other, many, strict=True)]
    assert same == [True, True, True, False, True]


@pytest.mark.parametrize("how", [{"seed": 1}, {"ema": False}, {"steps": 4}, {"cfg_scale": 3.0}])
def test_settings_change_the_images(trained, how):
    assert not np.array_equal(_sample(trained, **how), _sample(trained))


def test_guidance_acts_within_its_interval_alone(trained):
    plain, guided = _sample(trained), _sample(trained, cfg_scale=3.0)
    for interval, expected in ((GuidanceInterval(0.0, 1.0), guided), (GuidanceInterval(2.0, 3.0), plain)):
        assert np.array_equal(_sample(trained, cfg_scale=3.0, guidance_interval=interval), expected)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"count": 0}, "n: given 0, allowed 1 or more"),
        ({"classes": (3, 10)}, "classes: given 10, allowed 0 to 9"),
        ({"classes": (-1,)}, "classes: given -1, allowed 0 to 9"),
        ({"steps": 0}, "steps: given 0, allowed 1 or more"),
    ],
)
def test_settings_that_are_not_allowed_are_named(trained, how, message):
    with pytest.raises(ConfigError, match=message):
        _sample(trained, **how)


def test_where_no_checkpoint_is_there_are_no_samples(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=f"{path} is no checkpoint and no run with one"):
            _sample(path)


def test_an_unconditional_model_has_no_labels(tmp_path, tiny, digits):
    images = digits.gather(digits.labels[:64])
    store = write_store(tmp_path / "store", [(images, digits.labels[:64] * 0)], kind="pixels", num_classes=0)
    train(tiny(data={"path": str(store.path)}, train={"steps": 2}), tmp_path / "run")
    pixels, labels = sample_run(tmp_path / "run", 3, steps=2)
    assert pixels.shape == (3, 8, 8, 1) and labels is None
    with pytest.raises(ConfigError, match="classes: given 0, allowed none, the model is unconditional"):
        _sample(tmp_path / "run", classes=(0,))
    with pytest.raises(ConfigError, match=r"cfg_scale: given 2\.0; guidance needs labels"):
        _sample(tmp_path / "run", classes=(), cfg_scale=2.0)
