"""features: the judge of the digits."""

import os

import pytest
import torch

from erd_fast.evaluation import features, get_judge
from erd_fast.files import cache_dir

pytestmark = pytest.mark.slow

SMALL = 1024  # images shown to a judge whose numbers do not matter


@pytest.fixture(scope="module")
def real(digits) -> torch.Tensor:
    return digits.gather(torch.arange(len(digits)))


@pytest.fixture
def small(tmp_path, monkeypatch, real, digits):
    """``small()``: the judge of the digits after next to no training, with a cache of its own."""
    monkeypatch.setenv("ERD_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(features, "_IMAGES_SHOWN", SMALL)
    return lambda: get_judge(real, digits.labels, 10, "small")


def test_the_judge_of_the_digits_knows_them(real, digits):
    """One test, because training the judge takes seconds."""
    judge = get_judge(real, digits.labels, 10, digits.fingerprint)
    assert judge.holdout_accuracy > 0.9
    scores = judge.score(real, digits.labels)
    assert scores["class_accuracy"] > 0.99
    # The square root of rounding, in units of the trace; a distance between halves is far larger.
    assert abs(scores["fd_classifier"]) < 1e-5 * judge.real[1].trace()
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    # 1797 guesses of probability 1/10: deviation 0.007.
    assert judge.score(real, digits.labels[order])["class_accuracy"] == pytest.approx(0.1, abs=0.035)
    noise = torch.randint(256, real.shape, generator=torch.Generator().manual_seed(0)).byte()
    assert judge.score(noise, digits.labels)["fd_classifier"] > 0.1 * judge.real[1].trace()
    assert judge.score(real[::2], digits.labels[::2])["fd_classifier"] > abs(scores["fd_classifier"])
    path = cache_dir() / "judges" / f"{digits.fingerprint}-v1.safetensors"
    assert path.is_file()


def test_a_judge_is_trained_once_and_then_read(small, real, digits, tmp_path, monkeypatch):
    first = small()
    (path,) = (tmp_path / "judges").iterdir()
    written = path.stat().st_mtime_ns
    monkeypatch.setattr(features, "_train", lambda *given: pytest.fail("trained again"))
    second = small()
    assert path.stat().st_mtime_ns == written
    assert second.holdout_accuracy == first.holdout_accuracy
    assert second.score(real, digits.labels) == first.score(real, digits.labels)


def test_each_data_set_has_a_judge_of_its_own(small, real, digits, tmp_path):
    small()
    get_judge(real, digits.labels.flip(0), 10, "other")
    assert sorted(os.listdir(tmp_path / "judges")) == ["other-v1.safetensors", "small-v1.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "altered header", "empty"])
def test_a_damaged_judge_is_trained_again(small, real, digits, tmp_path, damage):
    first = small()
    (path,) = (tmp_path / "judges").iterdir()
    right = path.read_bytes()
    path.write_bytes(
        {"truncated": right[: len(right) // 2], "altered header": b"\xff" * 9 + right[9:], "empty": b""}[damage]
    )
    again = small()
    assert again.holdout_accuracy == first.holdout_accuracy
    assert again.score(real, digits.labels) == first.score(real, digits.labels)
    assert path.read_bytes() == right


def test_the_holdout_is_not_shown(monkeypatch, real, digits, tmp_path):
    monkeypatch.setenv("ERD_FAST_CACHE", str(tmp_path))
    shown = []
    monkeypatch.setattr(features, "_fit", lambda classifier, images, labels: shown.append(images))
    get_judge(real, digits.labels, 10, "none")
    trial, whole = shown
    assert len(trial) == 1797 - 1797 // 5 and torch.equal(whole, real)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    assert torch.equal(trial, real[order[359:]])
