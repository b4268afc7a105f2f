"""config: what is not allowed is refused with field, given and allowed; what is written is read back."""

import dataclasses
from pathlib import Path

import pytest

from erd_fast.errors import ConfigError
from erd_fast.training.config import MAY_CHANGE_ON_RESUME, RunConfig, config_text, load_config, refuse_changes
from erd_fast.training.presets import PRESETS


def _load(folder: Path, text: str, base: RunConfig | None = None) -> RunConfig:
    file = folder / "config.yaml"
    file.write_text(text)
    return load_config(file, base)


@pytest.mark.parametrize(
    ("field", "given", "allowed"),
    [
        ("train.steps", 0, "1 or more"),
        ("train.batch_size", 0, "1 or more"),
        ("train.micro_batch", -1, "0 or more"),
        ("train.micro_batch", 5, "divisors of train.batch_size = 16, or 0"),
        ("train.micro_batch", 32, "divisors of train.batch_size = 16, or 0"),
        ("train.seed", -1, "0 to 2**64 - 1"),
        ("train.seed", 1 << 64, "0 to 2**64 - 1"),
        ("train.label_drop", -0.1, "0 to 1"),
        ("train.label_drop", 1.1, "0 to 1"),
        ("train.label_drop", float("nan"), "0 to 1"),
        ("train.precision", "fp8", "fp32, tf32, bf16, fp16"),
        ("train.reduce_dtype", "fp16", "fp32, bf16"),
        ("train.cuda_graph", "yes", "on or off (true or false), got 'yes'"),
        ("train.track", "mlflow", "none, tensorboard, wandb"),
        ("train.log_every", 0, "1 or more"),
        ("train.save_every", -1, "0 or more"),
        ("train.keep_checkpoints", -1, "0 or more"),
        ("train.sample_every", -1, "0 or more"),
        ("data.loader", "residnt", "did you mean 'resident'?"),
        ("model.name", "DiT-tiny/3", "DiT-tiny/2"),
        ("model.hidden_size", 0, "1 or more"),
        ("model.depth", 0, "1 or more"),
        ("model.num_heads", 0, "1 or more"),
        ("model.patch_size", -2, "1 or more"),
        ("model.kernels", "of", "on or off (true or false), got 'of'"),
        ("model.residual", "fp16", "fp32, bf16"),
        ("model.recompute", "never", "auto, on, off"),
        ("diffusion.schedule", "cosin", "did you mean 'cosine'?"),
        ("diffusion.target", "epsilom", "did you mean 'epsilon'?"),
        ("diffusion.weighting", "ed", "did you mean 'erd'?"),
        ("diffusion.normalize", "men", "did you mean 'mean'?"),
        ("diffusion.reading", "logsnr", "did you mean 'log_snr'?"),
        ("diffusion.t_sampler", "logitnormal", "did you mean 'logit_normal'?"),
        ("diffusion.gamma", 0.0, "numbers above 0"),
        ("diffusion.gamma", float("nan"), "numbers above 0"),
        ("diffusion.gamma", 5.0, "none with erd (gamma belongs to min_snr, max_snr, soft_min_snr, p2)"),
        ("diffusion.k", -1.0, "numbers above 0"),
        ("diffusion.k", 2.0, "1 with erd (k belongs to p2)"),
        ("diffusion.clip_max", 0.0, "numbers above 0"),
        ("diffusion.clip_max", 0.5, "1 or more with normalize mean"),
        ("diffusion.logit_std", 0.0, "numbers above 0"),
        ("diffusion.logit_mean", float("inf"), "finite numbers"),
        ("optim.lr", 0.0, "numbers above 0"),
        ("optim.lr", float("nan"), "numbers above 0"),
        ("optim.betas", (0.9, 1.0), "two numbers from 0 to below 1"),
        ("optim.betas", (-0.1, 0.9), "two numbers from 0 to below 1"),
        ("optim.weight_decay", -0.1, "0 or more"),
        ("optim.ema_decay", 1.0, "0 to below 1"),
        ("optim.grad_clip", -1.0, "0 or more"),
        ("optim.warmup", -1, "0 or more"),
        ("optim.schedule", "linear", "constant, cosine"),
        ("eval.every", -1, "0 or more"),
        ("eval.images", -1, "0 or more"),
        ("eval.images", 1, "0, or 2 or more"),
        ("eval.sampler_steps", 0, "1 or more"),
        ("eval.cfg_scale", -1.0, "0 or more"),
    ],
)
def test_a_value_outside_its_range_names_field_given_and_allowed(tiny, field, given, allowed):
    section, name = field.split(".")
    with pytest.raises(ConfigError) as caught:
        tiny(**{section: {name: given}})
    assert all(part in str(caught.value) for part in (field, repr(given), allowed))


def test_parameters_of_a_rule_are_taken_with_it(tiny):
    config = tiny(diffusion={"weighting": "p2", "gamma": 0.5, "k": 2.0, "normalize": "none", "clip_max": 0.5})
    assert (config.diffusion.gamma, config.diffusion.k, config.diffusion.clip_max) == (0.5, 2.0, 0.5)
    with pytest.raises(ConfigError, match="importance_correct: given True, allowed False with t_sampler weight"):
        tiny(diffusion={"t_sampler": "weight", "importance_correct": True})


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("train.steps", 1),
        ("train.micro_batch", 16),
        ("train.seed", (1 << 64) - 1),
        ("train.label_drop", 0.0),
        ("train.label_drop", 1.0),
        ("train.keep_checkpoints", 0),
        ("optim.betas", (0.0, 0.0)),
        ("optim.ema_decay", 0.0),
        ("diffusion.clip_max", 1.0),
        ("eval.images", 2),
        ("eval.cfg_scale", 0.0),
    ],
)
def test_the_ends_of_a_range_are_allowed(tiny, field, given):
    section, name = field.split(".")
    assert tiny(**{section: {name: given}}).flat()[field] == given


def test_a_target_has_one_name_whichever_was_given(tiny):
    assert tiny(diffusion={"target": "velocity"}) == tiny(diffusion={"target": "v"})


def test_guidance_needs_label_dropout(tiny):
    with pytest.raises(ConfigError, match=r"eval.cfg_scale: given 1.5 with train.label_drop 0"):
        tiny(train={"label_drop": 0.0}, eval={"cfg_scale": 1.5})


def test_configurations_cannot_be_altered(tiny):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny().train.steps = 7


def test_flat_has_every_field_under_its_dotted_name(tiny):
    flat = tiny().flat()
    assert flat["train.steps"] == 6 and flat["optim.betas"] == (0.9, 0.999) and flat["model.hidden_size"] == 32
    sections = dataclasses.fields(RunConfig)
    assert len(flat) == sum(len(dataclasses.fields(getattr(tiny(), section.name))) for section in sections)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back_from_yaml(tmp_path, name):
    preset = PRESETS[name]()
    assert _load(tmp_path, config_text(preset)) == preset


def test_every_field_comes_back_from_yaml(tmp_path):
    """A value of every type and, for the floats, those that YAML writes in its own way."""
    config = RunConfig()
    given = {
        "train": {"steps": 7, "batch_size": 8, "micro_batch": 2, "seed": (1 << 64) - 1, "deterministic": True},
        "data": {"path": "no: true # [x]", "loader": "mmap"},
        "model": {"name": "DiT-S/4", "hidden_size": 8, "patch_size": None},
        "diffusion": {"schedule": "flow", "target": "u", "weighting": "constant", "normalize": "max"},
        "optim": {"lr": 1e-4, "betas": (0.5, 1e-7), "weight_decay": 1e22, "grad_clip": 0.1 + 0.2},
        "eval": {"cfg_scale": 1.0},
    }
    changed = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in given.items()}
    config = dataclasses.replace(config, **changed)
    back = _load(tmp_path, config_text(config))
    assert back == config
    assert [type(value) for value in back.flat().values()] == [type(value) for value in config.flat().values()]


def test_yaml_replaces_the_fields_it_names_alone(tmp_path, tiny):
    loaded = _load(tmp_path, "train: {steps: 7}\noptim:\n  lr: 3e-4\n  betas: [0, 1e-1]\n", tiny())
    assert loaded == tiny(train={"steps": 7}, optim={"lr": 3e-4, "betas": (0.0, 0.1)})
    assert type(loaded.optim.lr) is float and type(loaded.optim.betas[0]) is float
    assert _load(tmp_path, "") == RunConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {steps: 3}", r"unknown field 'trian' \(did you mean 'train'\?\); allowed: train, data, model"),
        ("train: {step: 3}", r"unknown field 'train.step' \(did you mean 'train.steps'\?\)"),
        ("1: 2", r"unknown field '1'"),
        ("train: 3", r"train: given 3, allowed fields and values"),
        ("train:", r"train: given None, allowed fields and values"),
        ("[train]", r"the file: given \['train'\], allowed fields and values"),
        ("train: {steps: 1.5}", r"train.steps: given 1.5, allowed a value of type int"),
        ("train: {steps: '3'}", r"train.steps: given '3', allowed a value of type int"),
        ("train: {steps: true}", r"train.steps: given True, allowed a value of type int"),
        ("train: {steps: }", r"train.steps: given None, allowed a value of type int"),
        ("train: {deterministic: 1}", r"train.deterministic must be on or off \(true or false\), got 1"),
        ("train: {label_drop: much}", r"train.label_drop: given 'much', allowed a value of type float"),
        ("train: {label_drop: true}", r"train.label_drop: given True, allowed a value of type float"),
        ("train: {precision: 16}", r"train.precision: .*allowed: fp32, tf32, bf16, fp16"),
        ("train: {precision: [fp32]}", r"train.precision: .*allowed: fp32, tf32, bf16, fp16"),
        ("train: {steps: 0}", r"train.steps: given 0, allowed 1 or more"),
        ("data: {path: 3}", r"data.path: given 3, allowed a value of type str"),
        ("model: {depth: two}", r"model.depth: given 'two', allowed a value of type int"),
        ("optim: {betas: 0.9}", r"optim.betas: given 0.9, allowed a list of 2"),
        ("optim: {betas: [0.9]}", r"optim.betas: given \[0.9\], allowed a list of 2"),
        ("optim: {betas: [0.9, x]}", r"optim.betas: given 'x', allowed a value of type float"),
        ("train: {steps: 3", r"cannot be read as YAML"),
    ],
)
def test_yaml_that_is_not_right_names_the_field(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, text)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path}/none.yaml: cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary.yaml: cannot be read as YAML"):
        load_config(tmp_path / "binary.yaml")


OTHER = {
    "train.steps": 60,
    "train.batch_size": 32,
    "train.micro_batch": 4,
    "train.seed": 1,
    "train.label_drop": 0.2,
    "train.precision": "bf16",
    "train.deterministic": True,
    "train.log_every": 2,
    "train.save_every": 2,
    "train.keep_checkpoints": 3,
    "train.sample_every": 2,
    "train.reduce_dtype": "bf16",
    "train.cuda_graph": False,
    "train.track": "wandb",
    "data.path": "elsewhere",
    "data.loader": "mmap",
    "data.check": False,
    "model.name": "DiT-tiny/4",
    "model.hidden_size": 64,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.patch_size": 4,
    "model.kernels": False,
    "model.residual": "bf16",
    "model.recompute": "on",
    "diffusion.schedule": "flow",
    "diffusion.target": "u",
    "diffusion.weighting": "constant",
    "diffusion.gamma": 2.0,
    "diffusion.k": 3.0,
    "diffusion.normalize": "none",
    "diffusion.reading": "log_snr",
    "diffusion.clip_max": 4.0,
    "diffusion.importance_correct": True,
    "diffusion.t_sampler": "stratified",
    "diffusion.logit_mean": 0.5,
    "diffusion.logit_std": 2.0,
    "optim.lr": 0.1,
    "optim.betas": (0.8, 0.9),
    "optim.weight_decay": 0.1,
    "optim.ema_decay": 0.8,
    "optim.grad_clip": 2.0,
    "optim.warmup": 3,
    "optim.schedule": "cosine",
    "eval.every": 3,
    "eval.images": 8,
    "eval.sampler_steps": 3,
    "eval.cfg_scale": 2.0,
}
FREE = {"train.steps", "train.micro_batch", "data.path", "data.loader", "data.check", "eval.every"}
FREE |= {"train.cuda_graph", "train.track"}
FREE |= {"model.kernels", "model.recompute", "train.log_every", "train.save_every", "train.sample_every"}


@pytest.mark.parametrize("written", ["on", "off", "true", "False", "'on'", "'off'"])
def test_booleans_are_on_or_off_or_true_or_false(tmp_path, written):
    """Quoted, as a config.yaml of an earlier version has them."""
    config = _load(
        tmp_path,
        f"model:\n  kernels: {written}\ntrain: {{cuda_graph: {written}, deterministic: {written}}}\n"
        f"data: {{check: {written}}}\ndiffusion: {{importance_correct: {written}}}",
    )
    expected = written.strip("'").lower() in ("on", "true")
    found = (config.model.kernels, config.train.cuda_graph, config.train.deterministic, config.data.check)
    assert found == (expected,) * 4 and config.diffusion.importance_correct == expected
    assert _load(tmp_path, config_text(config)) == config


@pytest.mark.parametrize("written", ["on", "off", "auto"])
def test_recompute_is_a_word_though_yaml_has_two_of_them_for_booleans(tmp_path, written):
    config = _load(tmp_path, f"model: {{recompute: {written}}}")
    assert config.model.recompute == written
    assert _load(tmp_path, config_text(config)) == config


def test_every_field_is_in_the_table_of_changes(tiny):
    assert set(OTHER) == set(tiny().flat())
    assert all(value != OTHER[name] for name, value in tiny().flat().items())
    assert {name for name in MAY_CHANGE_ON_RESUME if name in OTHER} <= FREE


@pytest.mark.parametrize("field", OTHER)
def test_a_run_refuses_changes_but_of_length_cadence_and_place(tiny, field):
    section, name = field.split(".")
    base = {"weighting": "p2"} if name in ("gamma", "k") else {}  # erd has no such parameters
    old, new = tiny(diffusion=base), tiny(**{section: {**base, name: OTHER[field]}})
    if field in FREE:
        refuse_changes(old, new, Path("runs/x"))
        return
    with pytest.raises(ConfigError) as caught:
        refuse_changes(old, new, Path("runs/x"))
    message = f"{field}: the run has {old.flat()[field]!r}, given {OTHER[field]!r}"
    assert message in str(caught.value) and "runs/x holds a run of another configuration" in str(caught.value)


def test_all_changes_are_named_at_once(tiny):
    with pytest.raises(ConfigError, match=r"train.seed: .*; optim.lr: "):
        refuse_changes(tiny(), tiny(train={"seed": 3}, optim={"lr": 0.5}), Path("x"))
