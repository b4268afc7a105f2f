"""profiling: where the time of a step goes, by kernel and kind."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from erd_fast.training.loop import train
from erd_fast.training.profiling import STEPS, Row, StepProfiler, kind_of, rows_of, table

CPU = torch.device("cpu")


def _event(name: str, begin: float, end: float, own: float = 0.0, device=DeviceType.CUDA, **how) -> SimpleNamespace:
    span = SimpleNamespace(start=begin, end=end)
    return SimpleNamespace(name=name, time_range=span, self_cpu_time_total=own, device_type=device, **how)


def test_gaps_are_what_no_kernel_covers():
    events = [
        _event("gemm", 0.0, 100.0),
        _event("gemm", 150.0, 250.0),
        _event("copy", 240.0, 300.0),  # on another stream, over the end of a gemm
        _event("a range over kernels", 0.0, 400.0, is_user_annotation=True),
        _event("aten::mm", 0.0, 900.0, 900.0, DeviceType.CPU),
    ]
    rows, seconds = rows_of(events, on_gpu=True)
    assert seconds == pytest.approx(300e-6)
    assert rows == [
        Row("matrix", "gemm", 2, pytest.approx(200e-6)),
        Row("memory", "copy", 1, pytest.approx(60e-6)),
        Row("gaps", "", 0, pytest.approx(50e-6)),
    ]


def test_on_a_cpu_operators_count_without_what_they_call():
    events = [
        _event("aten::linear", 0.0, 100.0, 10.0, DeviceType.CPU),
        _event("aten::addmm", 10.0, 100.0, 90.0, DeviceType.CPU),
    ]
    rows, seconds = rows_of(events, on_gpu=False)
    assert {row.name: row.seconds for row in rows} == pytest.approx(
        {"aten::linear": 10e-6, "aten::addmm": 90e-6, "": 0.0}
    )
    assert seconds == pytest.approx(100e-6) and rows_of([], on_gpu=True) == ([], 0.0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTN", "matrix"),
        ("aten::addmm", "matrix"),
        ("pytorch_flash::flash_fwd_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("_update_kernel", "memory"),
        ("aten::add_", "memory"),
        ("aten::sum", "memory"),
        ("triton_poi_fused__to_copy_convert_element_type_3", "memory"),
        ("upsample_bilinear2d_out_frame", "memory"),
        ("cudnn_convolution", "matrix"),
        ("_linear_gelu_kernel", "matrix"),
    ],
)
def test_kinds_are_told_by_name(name, kind):
    assert kind_of(name) == kind


def test_the_table_is_of_one_step():
    text = table([Row("matrix", "gemm", 4, 0.006), Row("gaps", "", 0, 0.002)], 0.008, steps=2)
    lines = [line.split() for line in text.splitlines()]
    assert ["matrix", "3.000", "75.0"] in lines and ["gaps", "1.000", "25.0"] in lines
    assert ["gemm", "2.0", "3.000", "75.0"] in lines and lines[-1] == ["all", "4.000", "100.0"]


def test_a_run_writes_trace_and_table(tmp_path, tiny, capsys):
    train(tiny(train={"steps": 8}), tmp_path / "run", profile=True)
    folder = tmp_path / "run" / "profile"
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    content = json.loads((folder / "kernels.json").read_text())
    assert content["steps"] == STEPS and {row["kind"] for row in content["kernels"]} >= {"matrix", "memory", "gaps"}
    assert sum(row["seconds"] for row in content["kernels"]) == pytest.approx(content["seconds"], rel=0.02)
    assert (folder / "kernels.txt").read_text() in capsys.readouterr().out
    train(tiny(train={"steps": 10}), tmp_path / "run", profile=True)  # goes on for two steps, and profiles these
    assert json.loads((folder / "kernels.json").read_text())["steps"] == 2


def test_a_run_with_no_steps_left_profiles_nothing(tmp_path):
    profiler = StepProfiler(tmp_path / "profile", CPU, replicated=False, steps_left=0)
    profiler.before()
    assert profiler.after() is None and not (tmp_path / "profile").exists()
