"""progress: durations, a bar on a terminal, lines elsewhere."""

import io
from types import SimpleNamespace

import pytest

from erd_fast import progress
from erd_fast.progress import Progress, duration, progress_bar

DAY = 86_400


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00:00"),
        (59, "00:00:59"),
        (59.6, "00:01:00"),
        (3600, "01:00:00"),
        (DAY - 1, "23:59:59"),
        (DAY - 0.4, "1 d 00:00:00"),
        (DAY + 3 * 3600 + 20 * 60 + 5, "1 d 03:20:05"),
        (400 * DAY, "400 d 00:00:00"),
    ],
)
def test_a_duration_counts_days(seconds, text):
    assert duration(seconds) == text


def _work(monkeypatch, total: int | None = 100, **how) -> None:
    """Two times twelve images in six seconds each, of 100."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Progress("encoding", "image", total, **how) as shown:
        for _ in range(2):
            now[0] += 6
            shown.count(12)


def test_a_line_tells_what_is_done_this_runs_rate_and_what_is_left(capsys, monkeypatch):
    _work(monkeypatch, done=40)
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == "encoding 64/100  2.0 images/s  00:00:18 left" and not said.err


def test_a_long_task_has_days_left(capsys, monkeypatch):
    _work(monkeypatch, total=1_000_000)
    assert capsys.readouterr().out.splitlines()[0].endswith("/1,000,000  2.0 images/s  5 d 18:53:08 left")


def test_without_a_total_there_is_nothing_left_to_tell(capsys, monkeypatch):
    _work(monkeypatch, total=None)
    assert capsys.readouterr().out.splitlines() == ["encoding 24  2.0 images/s"] * 2


def test_nothing_is_said_where_nothing_was_done_or_somebody_else_speaks(capsys, monkeypatch):
    _work(monkeypatch, quiet=True)
    with Progress("encoding", "image", 100, done=100):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar_and_no_lines(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    _work(monkeypatch, done=40)
    said = capsys.readouterr()
    assert "encoding" in said.err and "image/s" in said.err and not said.out


@pytest.mark.parametrize(
    ("total", "done", "text"),
    [
        (DAY * 402, 100_000, "| 100000/34732800 [1 d 03:46:40<400 d 20:13:20,  1.00image/s]"),
        (100_050, 100_000, "| 100000/100050 [1 d 03:46:40<00:00:50,  1.00image/s]"),
        (100, 0, "| 0/100 [1 d 03:46:40<?, ?image/s]"),
        (None, 100_000, "encoding: 100000image [1 d 03:46:40,  1.00image/s]"),
    ],
)
def test_a_bar_counts_days_and_does_without_a_rate_or_a_total(total, done, text):
    bar = progress_bar(total, desc="encoding", unit="image", file=io.StringIO())
    bar._time = lambda: bar.start_t + 100_000
    bar.n = done
    assert str(bar).endswith(text)
    bar.close()


def test_a_bar_counts_what_was_there_at_the_start_as_no_speed():
    bar = progress_bar(300, initial=100, unit="step", file=io.StringIO())
    bar._time = lambda: bar.start_t + 50
    bar.n = 200
    bar.set_postfix(loss="0.5")
    assert str(bar).endswith("| 200/300 [00:00:50<00:00:50,  2.00step/s, loss=0.5]")
    bar.close()
