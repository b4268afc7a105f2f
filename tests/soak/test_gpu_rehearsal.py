"""All stages of ``bench/run.py gpu``, rehearsed on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 180


@pytest.mark.soak
def test_every_stage_ends_well_within_three_minutes(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "gpu", "--rehearse", "--out", str(tmp_path)]
    run = subprocess.run([*command, "--seconds", str(SECONDS)], capture_output=True, text=True)
    print(run.stdout)
    found = json.loads((tmp_path / "results.json").read_text())
    assert run.returncode == 0 and {row["outcome"] for row in found["stages"]} == {"ok"}
    assert len(list(tmp_path.iterdir())) <= 8
    assert {"machine", "machine/linear", "ops/draw", "step/DiT-tiny/2", "data/step"} <= {
        row["group"] for row in found["records"]
    }
