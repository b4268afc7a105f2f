"""Op and its backends: which backend runs, what is refused and why, and what torch's machinery makes of an op."""

import importlib
import inspect
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import erd_fast
from erd_fast import ops
from erd_fast.diffusion import DiffusionProcess, get_schedule
from erd_fast.errors import BackendUnavailableError, ConfigError
from erd_fast.ops import OPS, ada_layer_norm, availability, diffusion_loss, explain, q_sample, record, use_backend
from erd_fast.ops.core.backend import External
from erd_fast.ops.core.op import Op
from erd_fast.ops.core.selection import requested
from erd_fast.ops.diffusion_loss import diffusion_loss_reference
from erd_fast.ops.patchify import patchify, unpatchify

T_INDEX = torch.tensor([1, 200, 999, 0])
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the backend would run on this machine's GPU")


GENERATOR = torch.Generator().manual_seed(0)
PREDICTION, TARGET = torch.randn(2, 4, 3, 4, 4, generator=GENERATOR)
WEIGHT = torch.rand(1000, generator=GENERATOR) + 0.5


def case() -> tuple[torch.Tensor, ...]:
    """(prediction, target, weight) of four images."""
    return PREDICTION.clone(), TARGET.clone(), WEIGHT.clone()


def loss_of(prediction: torch.Tensor) -> torch.Tensor:
    _, target, weight = case()
    return diffusion_loss(prediction, target, weight, T_INDEX).loss


def reference_of(prediction: torch.Tensor) -> torch.Tensor:
    _, target, weight = case()
    return diffusion_loss_reference(prediction, target, weight, T_INDEX, num_bins=10, batch_size=None).loss


def test_every_op_has_the_reference():
    for name, op in OPS.items():
        assert op.name == name and list(op.backends)[-1] == "reference"
        known = {*ops.BACKENDS, *(key for key, backend in op.backends.items() if isinstance(backend, External))}
        assert set(op.backends) <= known
        with use_backend("reference"):
            assert op.choose({op.forward.leader: torch.tensor(0)}).name == "reference"


def test_a_name_is_declared_once():
    with pytest.raises(ValueError, match="op draw is declared twice"):
        Op("draw", OPS["draw"].forward, backends=())


def test_kernels_name_only_what_their_op_has():
    """Arguments keep their names down to the kernel; one that does not exist would show only at a call."""
    for op in OPS.values():
        for direction in filter(None, (op.forward, op.backward)):
            module = importlib.import_module(f"erd_fast.kernels.{op.name}")
            kernels = [inspect.signature(getattr(module, direction.name)).parameters]
            suffix = {"forward": "fwd", "backward": "bwd"}[direction.name]
            compiled = getattr(torch.ops._erd_fast_C, f"{op.name}_{suffix}", None)
            if compiled is not None:
                kernels.append([argument.name for argument in compiled.default._schema.arguments])
            for names in kernels:
                assert set(names) <= {*direction.names, *direction.fields}, (op.name, direction.name)
                assert set(direction.fields) <= set(names)


@NO_GPU
@pytest.mark.parametrize("text", ["triton", "q_sample=triton", "draw=reference, q_sample=triton"])
def test_a_named_backend_that_cannot_run_raises(text):
    process = DiffusionProcess(get_schedule("cosine", 10))
    with use_backend(text), pytest.raises(BackendUnavailableError) as caught:
        process.q_sample(torch.zeros(1, 1, 2, 2), torch.tensor([3]), ids=torch.tensor([0]), seed=0)
    error = caught.value
    assert (error.op, error.backend) == ("q_sample", "triton")
    assert "no CUDA device" in error.reason and "another backend" in error.remedy
    assert error.reason in str(error) and error.remedy in str(error)


def test_a_gpu_older_than_the_build_is_refused_with_what_to_do():
    assert all(availability.too_old(gpu, ["80", "90", "100"]) is None for gpu in ((8, 0), (8, 9), (9, 0), (12, 0)))
    assert availability.too_old((9, 0), ["90a"]) is None
    reason, remedy = availability.too_old((7, 5), ["80", "90"])
    assert reason == "the extension was built for sm_80, sm_90 and newer, and this GPU is sm_75"
    assert remedy.startswith("reinstall with ERD_FAST_CUDA_ARCHS=75, or")
    assert availability.too_old((8, 0), ["90a"]) is not None


def test_a_driver_older_than_the_toolkit_is_told_what_to_do():
    assert all(availability.driver_too_old(driver, 13000) is None for driver in (13000, 13020, 14000))
    assert availability.driver_too_old(12080, 12090) is None and availability.driver_too_old(12080, 0) is None
    reason, remedy = availability.driver_too_old(12080, 13000)
    assert reason == "the extension was built with CUDA 13.0, and this driver is for CUDA 12.8"
    assert remedy == "update the driver, or reinstall with a toolkit of CUDA 12"


def test_devices_that_no_kernel_is_for_take_the_reference():
    x, rows = torch.empty(2, 3, 4, 4, device="meta"), torch.empty(2, 4, device="meta")
    with record() as recording:
        assert q_sample(x, rows, noise=x).x_t.shape == x.shape
    assert recording.names() == {"q_sample": "reference"}


def test_ops_without_the_named_backend_stay_auto():
    with use_backend("cpu"):
        assert requested("ada_layer_norm") is None and requested("q_sample") == "cpu"
    with (
        use_backend("cpu", ada_layer_norm="cpu"),
        pytest.raises(BackendUnavailableError, match="ada_layer_norm has no cpu backend"),
    ):
        ada_layer_norm(torch.zeros(1, 2, 8))


def test_a_block_overrides_the_one_around_it_and_ends():
    with use_backend(q_sample="triton"):
        with use_backend("auto"):
            assert requested("q_sample") is None
            with use_backend(q_sample="reference"):
                assert requested("q_sample") == "reference"
                assert requested("draw") is None
            assert requested("q_sample") is None
        assert requested("q_sample") == "triton"


def _with_variable(text: str, code: str) -> str:
    """What ``code`` prints in a process whose ERD_FAST_BACKEND is ``text``."""
    environment = {**os.environ, "ERD_FAST_BACKEND": text}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("way", ["eager", "compiled", "thread"])
def test_the_variable_requests_a_backend_unless_a_block_does(way):
    code = f"""
import threading, torch
from erd_fast.ops import q_sample, use_backend
from erd_fast.ops.core.recording import record
function = lambda x: q_sample(x, torch.ones(1, 4), noise=x).x_t
if "{way}" == "compiled":
    function = torch.compile(function, backend="aot_eager", fullgraph=True)
def calls():
    x = torch.zeros(1, 1, 2, 2)
    with record() as recording:
        function(x)
        with use_backend("auto"):
            function(x)
    print(*recording.backends["q_sample"])
thread = threading.Thread(target=calls)
thread.start() if "{way}" == "thread" else calls()
"""
    with record() as recording:
        q_sample(torch.zeros(1, 1, 2, 2), torch.ones(1, 4), noise=torch.zeros(1, 1, 2, 2))
    names = dict.fromkeys(["reference", *recording.backends["q_sample"]])
    assert _with_variable("draw=cpu,q_sample=reference", code).split() == [*names]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tritn", "unknown backend 'tritn' (did you mean 'triton'?)"),
        ("q_smple=cuda", "unknown op 'q_smple' (did you mean 'q_sample'?)"),
        ("q_sample=", "unknown backend ''"),
    ],
)
def test_unknown_names_suggest_the_nearest(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)), use_backend(text):
        pass


MODULATION, HIDDEN = torch.randn(3, 8, generator=GENERATOR).unbind(), torch.randn(24, 8, generator=GENERATOR)
TOKENS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ada_layer_norm": lambda x: ada_layer_norm(x, *[row.expand(2, 8) for row in MODULATION[:2]]),
    "residual_ada_layer_norm": lambda x: torch.cat(
        ops.residual_ada_layer_norm(x, 2 * x, *[row.expand(2, 8) for row in MODULATION])
    ),
    "attention": lambda x: ops.attention(torch.cat([x, x, x], -1), 2),
    "linear_gelu": lambda x: ops.linear_gelu(x, HIDDEN, HIDDEN[:, 0]),
    "gelu_mlp": lambda x: ops.gelu_mlp(x, HIDDEN, HIDDEN[:, 0], HIDDEN.t().contiguous(), HIDDEN[0]),
}
TRANSFORMS: dict[str, Callable[..., torch.Tensor]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "grad": lambda f, x: torch.func.grad(lambda it: f(it).square().sum())(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, -x])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", TOKENS)
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own modules
def test_compiled_transforms_are_those_of_eager_code(op, transform):
    def function(x: torch.Tensor) -> torch.Tensor:
        return TRANSFORMS[transform](TOKENS[op], x)

    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    torch.compiler.reset()
    found = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    assert found.any() and torch.allclose(found, function(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", TOKENS)
@pytest.mark.filterwarnings("ignore")  # of torch.jit
def test_a_trace_computes_from_its_own_input(op):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    traced = torch.jit.trace(TOKENS[op], (x.clone().requires_grad_(),), check_trace=False)
    other = (x + 1).requires_grad_()
    assert torch.equal(traced(other), TOKENS[op](other))


@pytest.mark.parametrize("backend", ["cudnn", "flash-attn-2"])
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own modules
@NO_GPU
def test_compiled_code_raises_for_an_external_backend_that_is_unavailable(backend):
    compiled = torch.compile(lambda x: ops.attention(x, 2), backend="aot_eager", fullgraph=True)
    with use_backend(attention=backend), pytest.raises(BackendUnavailableError, match="no CUDA device"):
        compiled(torch.randn(2, 5, 24))


def test_an_unknown_name_in_the_variable_raises_at_the_first_call():
    code = """
import torch
from erd_fast.errors import ConfigError
from erd_fast.ops import q_sample
try:
    q_sample(torch.zeros(1, 1, 2, 2), torch.ones(1, 4), noise=torch.zeros(1, 1, 2, 2))
except ConfigError as error:
    print(error)
"""
    assert "ERD_FAST_BACKEND: unknown backend 'tritn' (did you mean" in _with_variable("tritn", code)


def test_explain_says_which_and_why_not():
    text = explain("q_sample")
    assert text.splitlines()[0].startswith("q_sample takes ") and len(text.splitlines()) == 1 + len(ops.BACKENDS)
    with use_backend("reference"):
        prediction, target, weight = case()
        text = explain("diffusion_loss", prediction, target, weight, T_INDEX)
        assert text.startswith("diffusion_loss takes reference, requested")
        assert not re.search(r"cuda: can run", text)
    target.requires_grad_()
    assert "differentiable reference" in explain("diffusion_loss", prediction, target, weight, T_INDEX)
    with pytest.raises(ConfigError, match="did you mean 'draw'"):
        explain("drow")
    with pytest.raises(ValueError, match="diffusion_loss: weight"):
        explain("diffusion_loss", prediction, target, weight[:3])
    assert erd_fast.explain is explain and erd_fast.use_backend is use_backend


def test_what_runs_is_logged_once(caplog):
    prediction, _, _ = case()
    with caplog.at_level(logging.INFO, "erd_fast.ops"), use_backend("reference"), record() as recording:
        loss_of(prediction)
        loss_of(prediction)
    assert [record.message for record in caplog.records] == ["diffusion_loss runs on reference"]
    assert recording.backends == {"diffusion_loss": ["reference"]}


def test_gradients_are_those_of_the_reference():
    prediction = case()[0].requires_grad_()
    found, expected = (torch.autograd.grad(3.0 * f(prediction), prediction)[0] for f in (loss_of, reference_of))
    # Three float32 products in another order.
    assert (found - expected).abs().max() <= 4 * 2.0**-24 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch.func.jvp's own; its category changes with the version
def test_functorch_and_forward_mode_are_those_of_the_reference():
    prediction, (direction, *_) = case()[0], case()[1:]
    expected = torch.func.grad(reference_of)(prediction)
    assert torch.equal(torch.func.jacrev(loss_of)(prediction), expected)
    _, tangent = torch.func.jvp(loss_of, (prediction,), (direction,))
    _, reference_tangent = torch.func.jvp(reference_of, (prediction,), (direction,))
    assert torch.equal(tangent, reference_tangent) and tangent != 0
    stacked = torch.stack((prediction, 2 * prediction))
    assert torch.equal(torch.func.vmap(loss_of)(stacked), torch.func.vmap(reference_of)(stacked))


def test_a_second_derivative_is_refused_and_the_reference_has_it():
    prediction = case()[0].requires_grad_()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss_of(prediction), prediction, create_graph=True)
    (gradient,) = torch.autograd.grad(reference_of(prediction), prediction, create_graph=True)
    assert torch.autograd.grad(gradient.sum(), prediction)[0].abs().sum() > 0


@pytest.mark.filterwarnings("ignore")  # of torch's own tests
def test_ops_pass_the_checks_of_torch():
    prediction, target, weight = case()
    loss = (prediction.requires_grad_(), target, weight, T_INDEX, 10, 4, 0, True, None, "reference")
    torch.library.opcheck(torch.ops.erd_fast.diffusion_loss_fwd.default, loss)
    rows = torch.rand(1000, 4)
    for patch, dtype in ((0, torch.float32), (2, torch.bfloat16)):
        call = (target, rows, T_INDEX, None, 0, None, None, None, T_INDEX, 3, 0, None, None, patch, dtype, "reference")
        torch.library.opcheck(torch.ops.erd_fast.q_sample_fwd.default, call)
    table = torch.tensor([1 << 20, 1 << 31, 1 << 32])
    call = (torch.tensor(5), 3, 8, 100, 3, 7, 0, 0, table, 8, "reference")
    torch.library.opcheck(torch.ops.erd_fast.draw_fwd.default, call)


def test_the_dispatcher_has_only_the_calls_it_has_a_part_in(monkeypatch):
    """A plain call runs without it, with autograd or not; fake tensors and tensor subclasses go through it."""
    forward = OPS["diffusion_loss"].forward
    seen, registered = [], forward.registered
    monkeypatch.setattr(forward, "registered", lambda *args: (seen.append(args), registered(*args))[1])
    prediction, target, weight = case()
    diffusion_loss(torch.nn.Parameter(prediction, requires_grad=False), target, weight, T_INDEX, compute_grad=True)
    with torch.no_grad():
        diffusion_loss(prediction.requires_grad_(), target, weight, T_INDEX)
    diffusion_loss(prediction, target, weight, T_INDEX).loss.backward()
    assert not seen and prediction.grad is not None
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = diffusion_loss(torch.empty(4, 3, 4, 4), torch.empty(4, 3, 4, 4), torch.empty(4))
    assert len(seen) == 1 and isinstance(fake.loss, FakeTensor)
    diffusion_loss(TwoTensor(target, target), target, weight, T_INDEX)
    assert len(seen) == 2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_step_compiles_into_one_graph():
    process = DiffusionProcess(get_schedule("cosine"), "v")

    def step(counter, latents, prediction):
        drawn = process.draw(counter, global_batch=4, seed=1, batch_size=4, dataset_size=4)
        noisy = process.q_sample(latents, drawn.t_index, ids=drawn.ids, index=drawn.sample_index, seed=1)
        return noisy.x_t, process.loss(prediction, noisy.target, drawn.t_index).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    prediction = case()[0].requires_grad_()
    results = []
    for run in (step, compiled):
        x_t, loss = run(torch.tensor(0), case()[1], prediction)
        results.append((x_t, loss, torch.autograd.grad(loss, prediction)[0]))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


def test_the_training_path_needs_no_autograd_of_the_loss():
    prediction, target, weight = case()
    scale = torch.tensor(8.0)
    plain = diffusion_loss(prediction, target, weight, T_INDEX, compute_grad=True)
    scaled = diffusion_loss(prediction, target, weight, T_INDEX, compute_grad=True, loss_scale=scale)
    expected = torch.autograd.grad(reference_of(prediction.requires_grad_()), prediction)[0]
    assert (plain.dprediction - expected).abs().max() <= 4 * 2.0**-24 * expected.abs().max()
    assert torch.equal(scaled.dprediction, 8.0 * plain.dprediction) and torch.equal(scaled.loss, plain.loss)
    assert diffusion_loss(prediction.detach(), target, weight, T_INDEX).dprediction is None
    with pytest.raises(ValueError, match="allowed a detached one with loss_scale"):
        diffusion_loss(prediction, target, weight, T_INDEX, loss_scale=scale)


@pytest.mark.parametrize("factor", [1.0, 1 / 3, 2.0**16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autograd_in_half_precision_keeps_what_plain_pytorch_keeps(dtype, factor):
    """A batch so large that gradients are subnormal in float16 before a gradient scaler's factor."""
    images = torch.randn(2, 64, 4, 32, 32, generator=GENERATOR)
    prediction, weight = images[0].to(dtype).requires_grad_(), torch.rand(64, generator=GENERATOR) + 0.1
    leaf = prediction.detach().double().requires_grad_()
    truth = (weight.double() * (leaf - images[1]).square().flatten(1).mean(1)).sum() / 4096
    (expected,) = torch.autograd.grad(factor * truth, leaf)
    (factor * diffusion_loss(prediction, images[1], weight, batch_size=4096).loss).backward()
    # Two roundings to the dtype, when kept and when given on, six in float32; below float16's normal range its step.
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    step = 2.0**-24 if dtype == torch.float16 else 0.0
    allowed = (2 * unit + 6 * 2.0**-24) * expected.abs() + step
    assert ((prediction.grad.double() - expected).abs() <= allowed).all()


def test_evaluation_gives_a_loss_without_gradient():
    prediction, target, weight = case()
    found = diffusion_loss(prediction.requires_grad_(), target, weight, T_INDEX, compute_grad=False)
    assert found.dprediction is None and not found.loss.requires_grad
    explicit = diffusion_loss(prediction.half(), target, weight, T_INDEX, compute_grad=True)
    detached = diffusion_loss(prediction.half().detach(), target, weight, T_INDEX, compute_grad=True)
    assert torch.equal(explicit.dprediction, detached.dprediction)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patch_tokens_hold_the_image(patch):
    images = torch.arange(2 * 3 * 8 * 4).reshape(2, 3, 8, 4)
    tokens = patchify(images, patch)
    assert torch.equal(unpatchify(tokens, patch, 8, 4), images)
    y, x, channel = 5, 2, 1
    token, feature = (y // patch) * (4 // patch) + x // patch, ((y % patch) * patch + x % patch) * 3 + channel
    assert torch.equal(tokens[:, token, feature], images[:, channel, y, x])


def test_both_layouts_are_one_loss():
    prediction, target, weight = case()
    wide = torch.cat((prediction, torch.full_like(prediction, 1e9)), dim=1)
    for images in (prediction, wide):
        by_image = diffusion_loss(images, target, weight, T_INDEX, compute_grad=True)
        by_patch = diffusion_loss(patchify(images, 2), target, weight, T_INDEX, patch=2, compute_grad=True)
        assert torch.equal(by_image.loss, by_patch.loss)
        assert torch.equal(patchify(by_image.dprediction, 2), by_patch.dprediction)
