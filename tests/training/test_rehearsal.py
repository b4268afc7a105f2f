"""rehearsal: what a run tries before its first step."""

import json

import pytest
import torch

from erd_fast.errors import ConfigError
from erd_fast.ops import Autotuner, record
from erd_fast.training.rehearsal import rehearse, too_large, write_choices

CPU = torch.device("cpu")
GIB = 2**30


def test_a_rehearsal_changes_nothing(tmp_path, make_step, tiny, digits):
    from erd_fast.data import open_reader

    losses = []
    for rehearsed in (False, True):
        step = make_step(tiny(train={"micro_batch": 8}))
        if rehearsed:
            assert rehearse(step, Autotuner(), tmp_path / "kernels.json") == 0  # bytes of a GPU
            assert all(parameter.grad is None for parameter in step.model.parameters())
        batches = open_reader(digits, "resident", CPU).batches(step.plan, 0)
        losses.append([step(batches).item() for _ in range(3)])
    assert losses[0] == losses[1]


def test_stored_choices_are_taken_on_the_same_device_alone(tmp_path, make_step, tiny):
    file, step = tmp_path / "kernels.json", make_step(tiny())
    for device, expected in (("another", None), ("cpu", "flash")):
        file.write_text(json.dumps({"device": device, "choices": {"attention": {"some form": "flash"}}}))
        tuner = Autotuner()
        rehearse(step, tuner, file)
        assert tuner.choices(CPU).get("attention", {}).get("some form") == expected
    with record() as recording:
        step.rehearse(1)
    tuner.left_out["attention: triton: some form"] = "too large"
    write_choices(step, tuner, recording, file)
    stored = json.loads(file.read_text())
    assert stored["device"] == "cpu" and stored["used"]["attention"] and stored["choices"] == tuner.choices(CPU)
    assert stored["used"] == recording.names() and stored["left_out"] == tuner.left_out


@pytest.mark.parametrize("content", ["[]", '"x"', "3"])
def test_a_file_of_another_form_is_refused(tmp_path, make_step, tiny, content):
    (tmp_path / "kernels.json").write_text(content)
    with pytest.raises(ConfigError, match=r"kernels.json: given .*, allowed what a run has written there"):
        rehearse(make_step(tiny()), Autotuner(), tmp_path / "kernels.json")


def test_a_batch_that_does_not_fit_is_told_which_one_does():
    text = too_large(256, 256, available=80 * GIB, one=10 * GIB, per_image=GIB // 2)
    assert "train.micro_batch: given 256" in text and "so that 141 fit into the 80.00 GiB" in text
    assert "--train.micro_batch 128" in text
    assert "0.500 GiB for each further one" in text


def test_a_model_that_does_not_fit_at_all_is_told_so():
    assert "take a smaller model" in too_large(4, 4, available=8 * GIB, one=10 * GIB, per_image=GIB)
