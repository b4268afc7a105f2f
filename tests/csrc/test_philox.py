"""csrc/philox.h against its definition, erd_fast/random.py: run by the host compiler, compiled by nvcc."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from erd_fast import random
from support.builds import build, log_of, source

pytestmark = pytest.mark.build

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SEED = 0xFEDCBA9876543210  # both key words have their top bit in play
KEY = (SEED & 0xFFFFFFFF, SEED >> 32)
# Two below the smallest network of 64 pairs (long walks), scikit-learn's digits, MNIST, a full 32-bit index.
ORDER_SIZES = (1, 5, 1797, 60000, 1 << 32)

# int64 from stdin, int64 (floats: their bits) to stdout; the mode is the argument.
PROGRAM = r"""
#include "philox.h"
#include <cstdio>
#include <cstdlib>
#include <string>

using namespace erd_fast;

static bool take(int64_t* values, int count) {
    return fread(values, sizeof(int64_t), count, stdin) == (size_t)count;
}

static void give(int64_t value) { fwrite(&value, sizeof value, 1, stdout); }

static void give(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    give((int64_t)bits);
}

static void give(Words w) {
    give((int64_t)w.w0);
    give((int64_t)w.w1);
    give((int64_t)w.w2);
    give((int64_t)w.w3);
}

int main(int argc, char** argv) {
    std::string mode = argc > 1 ? argv[1] : "";
    int64_t v[6];
    if (mode == "philox") {
        while (take(v, 6)) give(philox_4x32(v[0], v[1], v[2], v[3], v[4], v[5]));
    } else if (mode == "words") {  // seed words, g, block
        while (take(v, 4)) give(words(v[0], v[1], LAB << 8 | NOISE, v[2], v[3]));
    } else if (mode == "uniforms") {
        while (take(v, 1)) give(unit_interval(v[0]));
    } else if (mode == "normals") {
        while (take(v, 2)) {
            Normals n = box_muller(v[0], v[1]);
            give(n.n0);
            give(n.n1);
        }
    } else if (mode == "log") {
        while (take(v, 1)) give(log_of(unit_interval(v[0])));
    } else if (mode == "turn") {
        float cosine, sine;
        while (take(v, 1)) {
            cos_sin_turn(v[0], &cosine, &sine);
            give(cosine);
            give(sine);
        }
    } else if (mode == "order") {  // seed words, n, g
        while (take(v, 4)) give(sample_order(v[0], v[1], v[3], v[2], order_side(v[2])));
    } else if (mode == "side") {
        while (take(v, 1)) give((int64_t)order_side(v[0]));
    } else {
        return 1;
    }
}
"""

# Uses every function of the header in device code.
KERNEL = r"""
#include "philox.h"

__global__ void philox_kernel(uint32_t k0, uint32_t k1, int64_t first, int64_t n, uint32_t side,
                              int64_t* order, float* out) {
    int64_t g = first + (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    order[g] = erd_fast::sample_order(k0, k1, g, n, side);
    erd_fast::Words w = erd_fast::words(k0, k1, erd_fast::TRAIN << 8 | erd_fast::NOISE, g, 0);
    erd_fast::Normals a = erd_fast::box_muller(w.w0, w.w1), b = erd_fast::box_muller(w.w2, w.w3);
    out[4 * g] = a.n0;
    out[4 * g + 1] = a.n1;
    out[4 * g + 2] = b.n0;
    out[4 * g + 3] = b.n1;
}
"""


@pytest.fixture(scope="module")
def run() -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Runs the C++ program: mode and int64 tensor in, int64 tensor out."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no host compiler (g++ or c++) on PATH")
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{CSRC}"]
    main = source("philox.cpp", PROGRAM)
    program = build("philox", lambda output: [compiler, *flags, str(main), "-o", str(output)])

    def call(mode: str, values: torch.Tensor) -> torch.Tensor:
        given = values.contiguous().numpy().tobytes()
        done = subprocess.run([program, mode], input=given, capture_output=True, timeout=60)
        assert done.returncode == 0
        return torch.frombuffer(bytearray(done.stdout), dtype=torch.int64)

    return call


def _floats(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


def _word_pairs() -> torch.Tensor:
    """(N, 2) words: all pairs of edges (ends, eighth turns, float32 rounding nearby), and random ones."""
    near = [edge + step for edge in range(0, (1 << 32) + 1, 1 << 29) for step in (-129, -128, -127, -1, 0, 1)]
    edges = torch.tensor(sorted({word for word in near if 0 <= word < 1 << 32}))
    drawn = torch.randint(0, 1 << 32, (200_000, 2), generator=torch.Generator().manual_seed(1))
    # Small words make the large radii: the tail deserves more than 200,000 uniform words give it.
    tail = torch.stack((drawn[:20_000, 0] >> 20, drawn[:20_000, 1]), dim=1)
    return torch.cat((torch.cartesian_prod(edges, edges), tail, drawn))


def test_constants_are_those_of_the_definition():
    header = (CSRC / "philox.h").read_text()

    def constant(name: str) -> tuple[float, ...]:
        found = re.findall(rf"\b{name}(?:\[\])? = (?:\{{([^}}]*)\}}|([^;,]*))[;,]", header)
        assert len(found) == 1, name
        return tuple(_number(text) for text in "".join(found[0]).split(","))

    assert constant("PHILOX_MULTIPLIER_0") + constant("PHILOX_MULTIPLIER_1") == random._PHILOX_MULTIPLIERS
    assert constant("PHILOX_KEY_STEP_0") + constant("PHILOX_KEY_STEP_1") == random._PHILOX_KEY_STEPS
    assert constant("PHILOX_ROUNDS") == (random._PHILOX_ROUNDS,)
    assert constant("LOG") == random.LOG
    assert constant("SIN") == random.SIN
    assert constant("COS") == random.COS
    assert constant("LN2") == (random._LN2,)
    assert constant("SQRT_HALF_BITS") == (random._SQRT_HALF_BITS,)
    assert constant("ORDER_ROUNDS") == (random.ORDER_ROUNDS,)
    assert constant("SMALLEST_SIDE") == (random._SMALLEST_SIDE,)
    for name, value in [*random.Purpose.__members__.items(), *random.Stream.__members__.items()]:
        assert f"{name} = {value.value}" in header


def _number(text: str) -> float:
    text = text.strip()
    return int(text, 0) if re.fullmatch(r"0x[0-9A-F]+|\d+", text) else float(text.removesuffix("f"))


def test_philox_words_are_bit_equal(run):
    drawn = torch.randint(0, 1 << 32, (1000, 6), generator=torch.Generator().manual_seed(0))
    # Random123's published vectors (kat_vectors, philox4x32 10).
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    given = torch.cat((torch.tensor([[0] * 6, [0xFFFFFFFF] * 6, pi]), drawn))
    known = torch.tensor(
        [
            [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ]
    )
    out = run("philox", given).view(-1, 4)
    assert torch.equal(out[:3], known)
    assert torch.equal(out, random.philox_4x32(given[:, :4], given[:, 4:]))


def test_words_of_images_are_bit_equal(run):
    images = torch.tensor([0, 1, (1 << 32) - 1, 1 << 32, (1 << 62) + 12345])
    blocks = torch.tensor([0, 1, 1023, (1 << 32) - 1])
    given = torch.cartesian_prod(torch.tensor([KEY[0]]), torch.tensor([KEY[1]]), images, blocks)
    expected = random.words(SEED, random.Purpose.LAB, random.Stream.NOISE, images, blocks)
    assert torch.equal(run("words", given).view(expected.shape), expected)


def test_uniforms_are_bit_equal(run):
    words = _word_pairs().flatten()
    assert torch.equal(_floats(run("uniforms", words)), random.unit_interval(words))


def test_normals_agree(run):
    pairs = _word_pairs()
    normals, expected = _floats(run("normals", pairs)).view(-1, 2), random.box_muller(pairs)
    assert normals.isfinite().all()
    assert normals.abs().max() <= 6.77
    error = (normals.double() - expected.double()).abs().max().item()
    assert error <= 2e-6, f"largest difference from the definition: {error:.3g}"


def test_logarithm_and_turn_are_closer_than_the_normals_ask(run):
    # fmaf rounds once, and the float64 stand-in of the definition nearly always to the same. Normals cannot
    # be held to this: float32 torch.sqrt on a CPU may be a unit in the last place off (MKL), sqrtf is not.
    word = _word_pairs().flatten()
    logarithm = random._log(random.unit_interval(word))
    assert (_floats(run("log", word)) == logarithm).double().mean() > 0.9999
    turn = torch.stack(random._cos_sin_turn(word), dim=1)
    assert (_floats(run("turn", word)).view(-1, 2) == turn).double().mean() > 0.9999


@pytest.mark.parametrize("size", ORDER_SIZES)
def test_order_is_bit_equal(run, size):
    small = size <= 60000
    g = torch.arange(3 * size) if small else (1 << 33) + torch.arange(0, size, size // 1000)
    given = torch.stack([torch.full_like(g, value) for value in (*KEY, size)] + [g], dim=1)
    assert torch.equal(run("order", given), random.sample_order(SEED, g, size))


def test_order_side_is_a_ceiled_root(run):
    roots = (1, 7, 8, 9, 245, 65535, 65536)
    sizes = [size for root in roots for size in range(root**2 - 1, root**2 + 2) if 1 <= size <= 1 << 32]
    for size, side in zip(sizes, run("side", torch.tensor(sizes)).tolist(), strict=True):
        assert size <= side**2
        assert side == 8 or (side > 8 and (side - 1) ** 2 < size)


def test_compiles_under_nvcc():
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    kernel = source("philox.cu", KERNEL)
    flags = ["-std=c++17", "-arch=sm_80", "-cubin", "-Xptxas=-v", "-Werror=all-warnings", f"-I{CSRC}"]
    cubin = build("philox.cubin", lambda output: [nvcc, *flags, str(kernel), "-o", str(output)])
    assert cubin.read_bytes()[:4] == b"\x7fELF"
    # The coefficients are immediates and the keys registers, or there would be a stack.
    used = log_of(cubin).read_text()
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in used, used
