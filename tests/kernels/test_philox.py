"""The Triton device functions of kernels/philox.py against their definition, erd_fast/random.py.

Triton reads TRITON_INTERPRET when it is imported, so this file starts itself twice: one process runs the
functions in the interpreter on CPU tensors, another compiles them ahead of time for GPUs. The tests read what
the two left.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from erd_fast import random

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from erd_fast.kernels import philox  # noqa: E402
from erd_fast.kernels.philox import box_muller, philox_4x32, sample_order, unit_interval, words  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SEED = 0xFEDCBA9876543210  # both key words have their top bit in play
ARCHITECTURES = (80, 90, 100)
# Two below the smallest network of 64 pairs (long walks), scikit-learn's digits, MNIST.
ORDER_SIZES = (1, 5, 1797, 60000)
EPOCHS = 3
LARGE_ORDER = (1 << 32, 1 << 33)  # n and first g: the index takes all 32 bits, g more
SCALAR_ORDER_SIZES = (5, LARGE_ORDER[0])  # one image a program, g a scalar: with a long walk, and with none

# Random123's published vectors (kat_vectors, philox4x32 10): counter, key, words.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@triton.jit
def _philox_kernel(counter_ptr, key_ptr, out_ptr, count, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < count
    c0 = tl.load(counter_ptr + row * 4, mask=mask).to(tl.uint32)
    c1 = tl.load(counter_ptr + row * 4 + 1, mask=mask).to(tl.uint32)
    c2 = tl.load(counter_ptr + row * 4 + 2, mask=mask).to(tl.uint32)
    c3 = tl.load(counter_ptr + row * 4 + 3, mask=mask).to(tl.uint32)
    k0 = tl.load(key_ptr + row * 2, mask=mask).to(tl.uint32)
    k1 = tl.load(key_ptr + row * 2 + 1, mask=mask).to(tl.uint32)
    w0, w1, w2, w3 = philox_4x32(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + row * 4, w0.to(tl.int64), mask=mask)
    tl.store(out_ptr + row * 4 + 1, w1.to(tl.int64), mask=mask)
    tl.store(out_ptr + row * 4 + 2, w2.to(tl.int64), mask=mask)
    tl.store(out_ptr + row * 4 + 3, w3.to(tl.int64), mask=mask)


@triton.jit
def _words_kernel(g_ptr, out_ptr, k0, k1, purpose_stream, blocks, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    mask = block < blocks
    w0, w1, w2, w3 = words(k0, k1, purpose_stream, tl.load(g_ptr + image), block)
    out_ptr += (image * blocks + block) * 4
    tl.store(out_ptr, w0.to(tl.int64), mask=mask)
    tl.store(out_ptr + 1, w1.to(tl.int64), mask=mask)
    tl.store(out_ptr + 2, w2.to(tl.int64), mask=mask)
    tl.store(out_ptr + 3, w3.to(tl.int64), mask=mask)


@triton.jit
def _normals_kernel(word_ptr, uniform_ptr, normal_ptr, pairs, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pair < pairs
    w0 = tl.load(word_ptr + 2 * pair, mask=mask).to(tl.uint32)
    w1 = tl.load(word_ptr + 2 * pair + 1, mask=mask).to(tl.uint32)
    n0, n1 = box_muller(w0, w1)
    tl.store(uniform_ptr + 2 * pair, unit_interval(w0), mask=mask)
    tl.store(uniform_ptr + 2 * pair + 1, unit_interval(w1), mask=mask)
    tl.store(normal_ptr + 2 * pair, n0, mask=mask)
    tl.store(normal_ptr + 2 * pair + 1, n1, mask=mask)


@triton.jit
def _order_kernel(g_ptr, out_ptr, k0, k1, count, dataset_size, side, BLOCK: tl.constexpr):
    image = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = image < count
    g = tl.load(g_ptr + image, mask=mask, other=0)
    tl.store(out_ptr + image, sample_order(k0, k1, g, dataset_size, side), mask=mask)


@triton.jit
def _scalar_order_kernel(g_ptr, out_ptr, k0, k1, dataset_size, side):
    image = tl.program_id(0).to(tl.int64)
    tl.store(out_ptr + image, sample_order(k0, k1, tl.load(g_ptr + image), dataset_size, side))


def _counters_and_keys() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 1 << 32, (1000, 6), generator=generator)
    known = torch.tensor([[*counter, *key] for counter, key, _ in KNOWN_ANSWERS])
    both = torch.cat((known, drawn))
    return both[:, :4].contiguous(), both[:, 4:].contiguous()


def _images() -> torch.Tensor:
    return torch.tensor([0, 1, (1 << 32) - 1, 1 << 32, (1 << 62) + 12345])


def _word_pairs() -> torch.Tensor:
    """(N, 2) words: all pairs of edges (ends, eighth turns, float32 rounding nearby), and random ones."""
    near = [edge + step for edge in range(0, (1 << 32) + 1, 1 << 29) for step in (-129, -128, -127, -1, 0, 1)]
    edges = torch.tensor(sorted({word for word in near if 0 <= word < 1 << 32}))
    drawn = torch.randint(0, 1 << 32, (200_000, 2), generator=torch.Generator().manual_seed(1))
    # Small words make the large radii: the tail deserves more than 200,000 uniform words give it.
    tail = torch.stack((drawn[:20_000, 0] >> 20, drawn[:20_000, 1]), dim=1)
    return torch.cat((torch.cartesian_prod(edges, edges), tail, drawn))


def _order_cases() -> list[tuple[int, torch.Tensor]]:
    small = [(size, torch.arange(EPOCHS * size)) for size in ORDER_SIZES]
    size, first = LARGE_ORDER
    return [*small, (size, first + torch.arange(0, size, size // 100))]


def _interpret(folder: Path) -> None:
    k0, k1 = SEED & 0xFFFFFFFF, SEED >> 32
    counter, key = _counters_and_keys()
    out = {"philox": torch.full_like(counter, -1)}
    _philox_kernel[(triton.cdiv(len(counter), 256),)](counter, key, out["philox"], len(counter), BLOCK=256)

    images = _images()
    out["words"] = torch.full((len(images), 5, 4), -1)
    tag = random.Purpose.LAB << 8 | random.Stream.NOISE
    _words_kernel[(len(images),)](images, out["words"], k0, k1, int(tag), 5, BLOCK=8)

    pairs = _word_pairs()
    out["uniforms"], out["normals"] = torch.full((2, *pairs.shape), float("nan"))
    grid = (triton.cdiv(len(pairs), 65536),)
    _normals_kernel[grid](pairs, out["uniforms"], out["normals"], len(pairs), BLOCK=65536)

    for size, g in _order_cases():
        side = philox.order_side(size)
        out[f"order {size}"] = torch.full_like(g, -1)
        block = min(triton.next_power_of_2(len(g)), 65536)
        grid = (triton.cdiv(len(g), block),)
        _order_kernel[grid](g, out[f"order {size}"], k0, k1, len(g), size, side, BLOCK=block)
        if size in SCALAR_ORDER_SIZES:
            out[f"scalar order {size}"] = torch.full((3,), -1)
            _scalar_order_kernel[(3,)](g, out[f"scalar order {size}"], k0, k1, size, side)
    torch.save(out, folder / "out.pt")


def _compile(folder: Path) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    outputs = {"uniform_ptr": "*fp32", "normal_ptr": "*fp32"}
    normals = ASTSource(
        fn=_normals_kernel,
        signature={"word_ptr": "*i64", **outputs, "pairs": "i32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": 256},
    )
    # A kernel's int is i32 or i64 by its value: a seed's two words need not be of one type.
    integers = {"g_ptr": "*i64", "out_ptr": "*i64", "k0": "i32", "k1": "i64"}
    words_source = ASTSource(
        fn=_words_kernel,
        signature={**integers, "purpose_stream": "i32", "blocks": "i32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": 256},
    )
    order = ASTSource(
        fn=_order_kernel,
        signature={**integers, "count": "i32", "dataset_size": "i64", "side": "i32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": 256},
    )
    scalar_order = ASTSource(fn=_scalar_order_kernel, signature={**integers, "dataset_size": "i64", "side": "i32"})
    found = {}
    for architecture in ARCHITECTURES:
        for source in (normals, words_source, order, scalar_order):
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
            found[f"{source.name} {architecture}"] = {
                "cubin": compiled.asm["cubin"][:4].hex(),
                "ptx": compiled.asm["ptx"],
            }
    (folder / "compiled.json").write_text(json.dumps(found))


def _run_this_file(mode: str, folder: Path, interpret: bool) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, __file__, mode, str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("interpreted")
    _run_this_file("interpret", folder, interpret=True)
    return torch.load(folder / "out.pt")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("compiled")
    _run_this_file("compile", folder, interpret=False)
    return json.loads((folder / "compiled.json").read_text())


def test_constants_are_those_of_the_definition():
    pairs = (
        ((philox.PHILOX_MULTIPLIER_0.value, philox.PHILOX_MULTIPLIER_1.value), random._PHILOX_MULTIPLIERS),
        ((philox.PHILOX_KEY_STEP_0.value, philox.PHILOX_KEY_STEP_1.value), random._PHILOX_KEY_STEPS),
        (philox.PHILOX_ROUNDS.value, random._PHILOX_ROUNDS),
        (tuple(philox.LOG.value), random.LOG),
        (tuple(philox.SIN.value), random.SIN),
        (tuple(philox.COS.value), random.COS),
        (philox.LN2.value, random._LN2),
        (philox.SQRT_HALF_BITS.value, random._SQRT_HALF_BITS),
        (philox.ORDER_ROUNDS.value, random.ORDER_ROUNDS),
        (philox.ORDER_PURPOSE_STREAM.value, int(random.Purpose.ORDER) << 8 | int(random.Stream.SCALARS)),
        (philox.SMALLEST_SIDE, random._SMALLEST_SIDE),
    )
    for ours, definition in pairs:
        assert ours == definition


def test_philox_words_are_bit_equal(interpreted):
    counter, key = _counters_and_keys()
    assert torch.equal(interpreted["philox"], random.philox_4x32(counter, key))
    known = torch.tensor([answer for _, _, answer in KNOWN_ANSWERS])
    assert torch.equal(interpreted["philox"][: len(known)], known)


def test_words_of_images_are_bit_equal(interpreted):
    expected = random.words(SEED, random.Purpose.LAB, random.Stream.NOISE, _images(), torch.arange(5))
    assert torch.equal(interpreted["words"], expected)


def test_uniforms_are_bit_equal(interpreted):
    assert torch.equal(interpreted["uniforms"], random.unit_interval(_word_pairs()))


def test_normals_agree(interpreted):
    normals = interpreted["normals"]
    assert normals.isfinite().all()
    assert normals.abs().max() <= 6.77
    error = (normals.double() - random.box_muller(_word_pairs()).double()).abs().max().item()
    assert error <= 2e-6, f"largest difference from the definition: {error:.3g}"


@pytest.mark.parametrize("size", [*ORDER_SIZES, LARGE_ORDER[0]])
def test_order_is_bit_equal(interpreted, size):
    g = dict(_order_cases())[size]
    expected = random.sample_order(SEED, g, size)
    assert torch.equal(interpreted[f"order {size}"], expected)
    if size in SCALAR_ORDER_SIZES:
        assert torch.equal(interpreted[f"scalar order {size}"], expected[:3])


def test_order_side_is_a_ceiled_root():
    sizes = [size for root in (1, 7, 8, 9, 245, 65535, 65536) for size in range(root**2 - 1, root**2 + 2)]
    for size in [size for size in sizes if 1 <= size <= 1 << 32]:
        side = philox.order_side(size)
        assert side == 8 or (side > 8 and (side - 1) ** 2 < size <= side**2)
        assert size <= side**2


@pytest.mark.build
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_ahead_of_time(compiled, architecture):
    kernels = {name: found for name, found in compiled.items() if name.endswith(f" {architecture}")}
    assert len(kernels) == 4
    for name, found in kernels.items():
        assert found["cubin"] == b"\x7fELF".hex(), name
        assert f".target sm_{architecture}" in found["ptx"], name
        assert ".local" not in found["ptx"], f"{name}: spills to local memory"
    ptx = kernels[f"_normals_kernel {architecture}"]["ptx"]
    # What makes a GPU agree with the definition: fused multiply-adds, a rounded root, no flushed denormals.
    assert "fma.rn.f32" in ptx and "sqrt.rn.f32" in ptx
    assert ".ftz" not in ptx and ".approx" not in ptx


if __name__ == "__main__":
    {"interpret": _interpret, "compile": _compile}[sys.argv[1]](Path(sys.argv[2]))
