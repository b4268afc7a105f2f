"""progress: a bar on a terminal, lines elsewhere."""

from types import SimpleNamespace

from erd_fast import progress
from erd_fast.progress import Progress


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
    assert said.out.splitlines()[0] == "encoding 64/100  2.0 images/s  0:18 left" and not said.err


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
