"""The residual stream: what its backward pass recomputes."""

import threading
from collections.abc import Callable

import pytest
import torch

from erd_fast.nn.stream import Norm, Stream
from erd_fast.ops import OPS, use_backend
from erd_fast.ops.core.backend import Reference

NORMS = ("ada_layer_norm", "residual_ada_layer_norm")


class Noted(Reference):
    """The reference under another name, with the threads that ran a forward pass on it."""

    def __init__(self):
        super().__init__()
        self.name, self.forwards = "cpu", []

    def run(self, direction, device, args):
        if direction.name == "forward":
            self.forwards.append(threading.current_thread())
        return super().run(direction, device, args)


def here(call: Callable[[], None]) -> threading.Thread:
    call()
    return threading.current_thread()


def elsewhere(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return thread


@pytest.mark.parametrize("run", [here, elsewhere])
def test_a_recomputed_pass_runs_on_the_backend_of_its_forward_pass(run, monkeypatch):
    """Outside of the block that requested the backend, and in a thread that was never in it."""
    noted = [Noted() for _ in NORMS]
    for op, backend in zip(NORMS, noted, strict=True):
        monkeypatch.setattr(OPS[op], "_available", OPS[op].available())  # auto does not take the new one
        monkeypatch.setitem(OPS[op].backends, "cpu", backend)
    x, (shift, scale, gate) = torch.randn(2, 5, 8), torch.randn(3, 2, 8)
    norm, layers = Norm(1e-6, shift, scale), [torch.nn.Linear(8, 8) for _ in range(3)]
    with use_backend("cpu"):
        stream = Stream(x, norm, torch.float32, recompute=True)
        for layer in layers[:2]:
            stream.branch(layer, gate, norm)
        loss = stream.last_branch(layers[2]).sum()
    assert [backend.forwards for backend in noted] == [[threading.current_thread()], [threading.current_thread()] * 2]
    for backend in noted:
        backend.forwards.clear()
    thread = run(loss.backward)
    # The inputs of the first and the last layer are normalised streams; a branch and a stream make that of the second.
    assert [backend.forwards for backend in noted] == [[thread] * 2, [thread]]
    assert all(layer.weight.grad.isfinite().all() for layer in layers)
