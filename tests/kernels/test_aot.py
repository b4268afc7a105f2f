"""Every kernel, as its launcher launches it, compiled ahead of time: it compiles, and keeps all values in registers."""

import dataclasses
import re

import pytest

aot = pytest.importorskip("support.triton_aot")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.build
@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
@pytest.mark.parametrize("configuration", aot.CONFIGURATIONS)
def test_compiles_without_stack_local_memory_or_spills(configuration, architecture):
    found = aot.compile_configuration(configuration, architecture)
    assert found, "the launcher launched nothing"
    for kernel, used in found:
        assert f".target sm_{architecture}" in used.ptx, kernel
        assert (used.stack, used.local) == (0, 0), f"{kernel}: {used.registers} registers"


@pytest.mark.build
def test_a_kernel_that_spills_would_be_seen():
    (launch,) = aot.launches(aot.CONFIGURATIONS["q_sample mean_std"])
    starved = dataclasses.replace(launch, options={**launch.options, "maxnreg": 24})
    assert aot.compile_launch(starved, 90).stack > 0


def test_the_launches_caught_are_those_of_training():
    (launch,) = aot.launches(aot.CONFIGURATIONS["q_sample mean_std"])
    assert launch.options == {"num_warps": 8}
    assert launch.arguments["PATCH"] == 2
    assert launch.arguments["flip_ptr"] is None
    assert aot.launches(lambda: None) == []


@pytest.mark.build
def test_full_blocks_move_in_whole_vectors():
    """Four elements a thread: 16 bytes of float32, 8 of the 16-bit types. Each is one access, or the table is stale."""
    for name, others in {"q_sample mean_std": 2, "q_sample mean_logvar image fp16": 2, "q_sample sample": 1}.items():
        ((_, used),) = aot.compile_configuration(name, 90)
        assert len(re.findall(r"st\.global\.v4\.b32", used.ptx)) == 1, name  # target
        assert len(re.findall(r"st\.global\.v2\.b32", used.ptx)) == 1, name  # x_t
        assert len(re.findall(r"st\.global", used.ptx)) == 2, name
        assert len(re.findall(r"ld\.global\.v2\.b32", used.ptx)) == others, name  # latents


@pytest.mark.build
def test_the_last_program_sees_what_all_others_wrote():
    ((_, used),) = aot.compile_configuration("diffusion_loss 1x8x8", 90)  # one warp: no other barrier lies between
    assert "atom.global.gpu.acq_rel.add" in used.ptx
    before = used.ptx[: used.ptx.index("atom.global")]
    assert before.rindex("st.global") < before.rindex("bar.sync")
    assert not re.search(r"(atom|red)\S*\.f32", used.ptx), "a float atomic has no fixed order"
