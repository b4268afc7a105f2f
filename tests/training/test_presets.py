"""presets: known by name, described with hardware and time."""

import pytest

from erd_fast.errors import ConfigError
from erd_fast.training.loop import describe
from erd_fast.training.presets import PRESETS, describe_presets, get_preset


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown preset 'digit' \(did you mean 'digits'\?\); allowed: digits"):
        get_preset("digit")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_described_with_hardware_and_time(name):
    (line,) = [line for line in describe_presets().splitlines() if line.startswith(f"{name}: ")]
    assert any(hardware in line for hardware in ("CPU", "GPU", "H100", "A100"))
    assert any(word in line for word in ("minute", "hour", "not measured"))


def test_digits_fits_its_data():
    assert "1,797 samples, pixels (1, 8, 8)" in describe(get_preset("digits"))
