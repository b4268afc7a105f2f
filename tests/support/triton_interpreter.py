"""Run launchers of kernels/ in Triton's interpreter, on CPU tensors.

Triton reads TRITON_INTERPRET when it is imported, so the calls of a test file go to one process of their own and come
back with their outputs filled::

    calls = [Call("draw", (counter, seed, ..., flip)), ...]
    for arguments in interpret(calls, tmp_path): ...

The interpreter computes with NumPy: tl.fma rounds twice, float32 to bfloat16 is cut off instead of rounded, and
programs run one after another in the order of the grid. Its tl.dot knows no bfloat16, and it takes tl.multiple_of at
its word: here it does, and does not.
"""

import importlib
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erd_fast.ops.tensor_table import Slot, TensorTable

ROOT = Path(__file__).resolve().parents[2]
UNIT = 2.0**-24  # a float32 operation rounds by this, relative
# What one rounding of a float32 to a type changes, relative and (below the normal range) absolute. bfloat16 is cut off:
# a whole ulp instead of half.
ROUNDING = {torch.float32: (0.0, 0.0), torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-7, 0.0)}


@dataclass(frozen=True)
class Call:
    """``erd_fast.kernels.<op>.<function>(*arguments)``; arguments are tensors, numbers, None.

    Rows and places of the table of ``slots`` come before them, if there are any: addresses are those of one process.
    """

    op: str
    arguments: tuple[Any, ...]
    function: str = "forward"
    slots: tuple[Slot, ...] = ()


def interpret(calls: list[Call], folder: Path) -> list[tuple[Any, ...]]:
    """Arguments of each call after it ran, and its slots behind them; the caller's tensors are left as they were."""
    plain = [(call.op, call.function, call.arguments, [tuple(slot) for slot in call.slots]) for call in calls]
    torch.save(plain, folder / "calls.pt")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return [(*arguments, *(Slot(*slot) for slot in slots)) for arguments, slots in torch.load(folder / "results.pt")]


def patchify(images: Tensor, patch: int) -> Tensor:
    """(N, C, H, W) to the patch tokens of kernels/: (N, (H/p)(W/p), p*p*C), a feature (y%p, x%p, c)."""
    n, c, h, w = images.shape
    cut = images.reshape(n, c, h // patch, patch, w // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, patch * patch * c)


def within_memory(values: Tensor, offset: int) -> Tensor:
    """Values in memory that is NaN around them; at an offset of 8 elements they are aligned to 16 bytes, at 1 not."""
    memory = torch.full((values.numel() + 16,), torch.nan, dtype=values.dtype)
    return memory[offset : offset + values.numel()].copy_(values)


def around(values: Tensor) -> Tensor:
    """The rest of that memory."""
    memory = values.as_strided((values.numel() + 16,), (1,), 0)
    first = values.storage_offset()
    return torch.cat([memory[:first], memory[first + values.numel() :]])


def _multiply_in_float32() -> None:
    """The interpreter keeps bfloat16 as its bits, and its tl.dot multiplies those. float16 it multiplies far more
    slowly than float32, which holds both."""
    from triton import language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)
        return interpreter.TensorHandle(handle.data.astype("float32"), tl.float32)

    def with_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, wide(a), wide(b), *rest)

    interpreter.InterpreterBuilder.create_dot = with_numbers


def _check_alignment() -> None:
    from triton.runtime import interpreter

    set_attr = interpreter.TensorHandle.set_attr

    def checked(self: Any, name: str, value: Any) -> None:
        if name == "tt.divisibility" and self.data.size == 1:
            assert int(self.data.item()) % value[0] == 0, f"{self.data.item()} is no multiple of {value[0]}"
        set_attr(self, name, value)

    interpreter.TensorHandle.set_attr = checked


def _table(slots: list[Any]) -> tuple[Tensor, ...]:
    if not slots:
        return ()
    table = TensorTable(torch.device("cpu"))
    table.update([Slot(*slot) for slot in slots])
    return table.rows, table.places


def _main(folder: Path) -> int:
    _multiply_in_float32()
    _check_alignment()
    results = []
    for number, (op, function, arguments, slots) in enumerate(torch.load(folder / "calls.pt")):
        try:
            getattr(importlib.import_module(f"erd_fast.kernels.{op}"), function)(*_table(slots), *arguments)
        except Exception:
            traceback.print_exc()
            print(f"call {number}: {op}.{function}", file=sys.stderr)
            return 1
        results.append((arguments, slots))
    torch.save(results, folder / "results.pt")
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
