"""lab weights: what it writes is every combination, and says what the weights are."""

import contextlib
import csv
import io
import re

import numpy as np
import pytest
from PIL import Image

from erd_fast import cli
from erd_fast.diffusion import RULES, SCHEDULES, TARGETS, get_schedule, loss_weight, weight_table
from erd_fast.errors import RunError
from erd_fast.lab.weights import weightings, write_weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder, what was printed) of the command line, run once for all tests."""
    folder, printed = tmp_path_factory.mktemp("lab") / "weights", io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.main(["lab", "weights", "--out", str(folder)])
    return folder, printed.getvalue()


@pytest.fixture
def written(ran):
    return ran[0]


def read(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_table_has_every_combination(written):
    rows = read(written / "weights.csv")
    found = [(row["schedule"], row["target"], row["rule"]) for row in rows]
    assert found == [(s, t, r) for s in SCHEDULES for t in TARGETS for r in RULES]
    forms = {(row["target"], row["rule"]): row["form"] for row in rows}
    assert forms["eps", "min_snr"] == "published" and forms["u", "min_snr"] == "derived"
    erd = next(row for row in rows if (row["schedule"], row["target"], row["rule"]) == ("cosine", "eps", "erd"))
    assert float(erd["mean"]) == pytest.approx(0.64195, abs=1e-5)
    assert float(erd["largest"]) == pytest.approx(1.5578, abs=1e-4)


def test_curves_are_the_three_views(written):
    rows = [row for row in read(written / "curves.csv") if (row["schedule"], row["rule"]) == ("vp", "min_snr")]
    on_eps = [row for row in rows if row["target"] == "eps"]
    assert len(on_eps) == 101 and len(rows) == 101 * len(TARGETS)
    schedule = get_schedule("vp")
    place = np.linspace(0, len(schedule) - 1, 101).round().astype(int)
    weight = weight_table("min_snr", "eps", schedule)[place]
    snr = np.exp(schedule.log_snr[place])
    for name, expected in {
        "t": schedule.time[place],
        "log_snr": schedule.log_snr[place],
        "weight": weight,
        "weight_x0": weight * snr,
        "effort": weight / np.abs(schedule.d_log_snr[place]),
    }.items():
        assert np.allclose([float(row[name]) for row in on_eps], expected, rtol=1e-5, atol=0)  # six digits


@pytest.mark.parametrize("name", SCHEDULES)
def test_effort_is_a_density_and_its_quantiles_lie_in_order(name):
    schedule = get_schedule(name)
    for found in weightings(schedule):
        assert found.weight.mean() == pytest.approx(1.0)
        # The grid's Riemann sum over lambda: effort |d lambda / dt| / K.
        assert (found.effort * np.abs(schedule.d_log_snr)).mean() == pytest.approx(1.0)
        high, median, low = found.log_snr_quantiles()
        assert high >= median >= low
    flow = next(found for found in weightings(get_schedule("flow")) if (found.target, found.rule) == ("u", "constant"))
    assert flow.log_snr_quantiles()[1] == pytest.approx(0.0, abs=1e-3)  # half of the times have SNR above 1
    assert flow.mean == loss_weight("constant", "u", 0.5, 0.5)


def test_each_schedule_has_a_picture(written):
    for name in SCHEDULES:
        with Image.open(written / f"{name}.png") as picture:
            colours = picture.convert("RGB").getcolors(maxcolors=1 << 24)
            assert picture.width > 1000 and picture.height > 1000 and len(colours) > 60


def test_the_page_is_whole_and_needs_nothing_else(written):
    text = (written / "weights.html").read_text()
    for name in [*SCHEDULES, *RULES, *TARGETS]:
        assert re.search(rf"\b{name}\b", text)
    assert text.count("data:image/png;base64,") == len(SCHEDULES)
    assert "://" not in re.sub(r"base64,[^\"]*", "", text)
    assert "ERD on eps is P2 with k = 1, gamma = 1/2" in text and "ERD on u is the constant weight" in text


def test_the_command_names_what_it_wrote(ran):
    folder, printed = ran
    assert printed.splitlines()[0] == f"wrote {folder / 'weights.html'}"
    assert sorted(line.removeprefix("wrote ") for line in printed.splitlines()) == sorted(map(str, folder.iterdir()))


def test_a_place_that_may_not_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot create the folder"):
        write_weights(tmp_path / "file" / "weights")


def test_an_unknown_experiment_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["lab", "wights", "--out", "x"])
    assert ended.value.code == 2
    assert "weights" in capsys.readouterr().err
