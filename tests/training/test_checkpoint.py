"""checkpoint: whole or absent, back bit for bit, and damage is named."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from erd_fast.data import open_reader
from erd_fast.errors import DataError, RunError
from erd_fast.models import create_model
from erd_fast.training import checkpoint
from erd_fast.training.build import model_arguments
from erd_fast.training.checkpoint import (
    CheckpointState,
    latest_checkpoint,
    load_state,
    load_weights,
    restore,
    save_checkpoint,
)
from erd_fast.training.step import TrainStep

FILES = ["ema.safetensors", "model.safetensors", "state.json", "training.safetensors"]


def _go_on(step: TrainStep, digits, count: int) -> list[float]:
    begin = int(step.counter) // step.config.train.batch_size
    batches = open_reader(digits, "resident", torch.device("cpu")).batches(step.plan, begin)
    return [step(batches).item() for _ in range(count)]


def _save(folder, step: TrainStep, number: int, digits, keep: int = 0):
    state = CheckpointState(
        step=number,
        images=int(step.counter),
        data=digits.fingerprint,
        model=model_arguments(step.config, digits),
        schedule="cosine",
        target="eps",
        kind="pixels",
        scale=[],
        shift=[],
    )
    return save_checkpoint(folder, state, step, step.sum_totals(), keep)


@pytest.fixture
def step(make_step, tiny, digits) -> TrainStep:
    """Three steps into a run, the log interval open."""
    step = make_step(tiny())
    _go_on(step, digits, 3)
    return step


def test_everything_comes_back_bit_for_bit(tmp_path, step, make_step, tiny, digits):
    path = _save(tmp_path, step, 3, digits)
    assert path.name == "step-00000003" and sorted(os.listdir(path)) == FILES
    other = make_step(tiny())
    state = load_state(path)
    restore(path, state, other)
    assert (state.step, state.images) == (3, 48)
    assert torch.equal(other.counter, step.counter)
    assert other.optimizer.counts.tolist() == step.optimizer.counts.tolist() == [3, 0, 0]
    assert all(torch.equal(total, step.totals[name]) for name, total in other.totals.items())
    for name, tensor in step.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor), name
    for mine, theirs in zip(other.model.parameters(), step.model.parameters(), strict=True):
        kept, expected = other.optimizer.state[mine], step.optimizer.state[theirs]
        assert kept.keys() == expected.keys() == {"exp_avg", "exp_avg_sq", "ema"}
        assert all(torch.equal(kept[name], value) for name, value in expected.items())
    assert _go_on(other, digits, 3) == _go_on(step, digits, 3)


def test_saving_changes_nothing(tmp_path, make_step, step, tiny, digits):
    _save(tmp_path, step, 3, digits)
    other = make_step(tiny())
    _go_on(other, digits, 3)
    assert _go_on(step, digits, 2) == _go_on(other, digits, 2)


def test_a_checkpoint_holds_weights_and_their_averages_under_stock_keys(tmp_path, step, digits):
    path = _save(tmp_path, step, 3, digits)
    model, ema = load_file(path / "model.safetensors"), load_file(path / "ema.safetensors")
    assert model.keys() == ema.keys() == step.model.state_dict().keys()
    for name, parameter in step.model.named_parameters():
        assert torch.equal(model[name], parameter)
        assert torch.equal(ema[name], step.optimizer.state[parameter]["ema"])
    assert any(not torch.equal(model[name], ema[name]) for name in model)


@pytest.mark.parametrize("ema", [True, False])
def test_weights_load_into_a_model_of_the_stored_arguments(tmp_path, step, digits, ema):
    path = _save(tmp_path, step, 3, digits)
    model = create_model(**load_state(path).model)
    load_weights(path, model, ema)
    expected = load_file(path / ("ema.safetensors" if ema else "model.safetensors"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_failed_save_leaves_no_folder_and_the_old_ones(tmp_path, step, digits, monkeypatch):
    _save(tmp_path, step, 2, digits)
    write = checkpoint.save_file

    def full(tensors, file):
        if file.name == "training.safetensors":
            raise OSError(28, "No space left on device")
        write(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match=r"cannot write .*step-00000003: No space left on device"):
        _save(tmp_path, step, 3, digits, keep=1)
    assert os.listdir(tmp_path) == ["step-00000002"]


def test_parameters_are_their_own_again_after_a_failed_save(tmp_path, step, digits, monkeypatch):
    before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
    monkeypatch.setattr(checkpoint, "write_json", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _save(tmp_path, step, 3, digits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in step.model.state_dict().items())


@pytest.mark.parametrize(("keep", "kept"), [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4])])
def test_the_newest_checkpoints_are_kept(tmp_path, step, digits, keep, kept):
    for number in (1, 2, 3, 4):
        _save(tmp_path, step, number, digits, keep)
    assert sorted(os.listdir(tmp_path)) == [f"step-{number:08d}" for number in kept]


def test_the_newest_is_that_of_the_largest_step(tmp_path):
    assert latest_checkpoint(tmp_path) is latest_checkpoint(tmp_path / "absent") is None
    for name in ("step-99999999", "step-100000000", "step-00000007", ".step-200000000.x.partial", "step-x"):
        (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-100000000"


@pytest.mark.parametrize("damage", ["truncated", "altered header", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(tmp_path, step, make_step, tiny, digits, name, damage):
    file = _save(tmp_path, step, 3, digits) / name
    if damage == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"\xff" * 20 + file.read_bytes()[20:])
    with pytest.raises(DataError, match=str(file)):
        restore(file.parent, load_state(file.parent), make_step(tiny()))


def test_a_missing_tensor_is_named(tmp_path, step, make_step, tiny, digits):
    path = _save(tmp_path, step, 3, digits)
    tensors = load_file(path / "training.safetensors")
    del tensors["exp_avg.x_embedder.proj.weight"]
    save_file(tensors, path / "training.safetensors")
    with pytest.raises(DataError, match=r"step-00000003: tensor 'exp_avg.x_embedder.proj.weight' is missing"):
        restore(path, load_state(path), make_step(tiny()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 1}, "format_version 1; this version of erd-fast reads 2"),
        ({"step": None}, "step"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_state_of_another_form_is_refused(tmp_path, step, digits, fields, message):
    path = _save(tmp_path, step, 3, digits)
    content = {**dataclasses.asdict(load_state(path)), **fields}
    content = {name: value for name, value in content.items() if value is not None}
    (path / "state.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        load_state(path)


@pytest.mark.parametrize("other", [{"hidden_size": 64}, {"depth": 2}, {"patch_size": 4}])
def test_weights_of_another_model_do_not_fit(tmp_path, step, digits, other):
    path = _save(tmp_path, step, 3, digits)
    model = create_model(**{**load_state(path).model, **other})
    with pytest.raises(DataError, match=r"ema.safetensors does not fit the model"):
        load_weights(path, model)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_saved_as_masters_and_comes_back_bit_for_bit(tmp_path, make_step, tiny, digits, precision):
    config = tiny(train={"precision": precision})
    step = make_step(config)
    _go_on(step, digits, 3)
    path = _save(tmp_path, step, 3, digits)
    weights, averages = load_file(path / "model.safetensors"), load_file(path / "ema.safetensors")
    lowered = 0
    for name, parameter in step.model.named_parameters():
        assert weights[name].dtype == averages[name].dtype == torch.float32
        assert torch.equal(weights[name], step.optimizer.master(parameter))
        lowered += not torch.equal(weights[name], weights[name].to(parameter.dtype).float())
    assert lowered > 0
    other = make_step(config)
    restore(path, load_state(path), other)
    assert not other.optimizer._masters  # those of the start are gone, and not kept beside the state
    assert _go_on(other, digits, 3) == _go_on(step, digits, 3)
