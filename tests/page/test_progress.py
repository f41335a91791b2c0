"""What is shown while experiments run."""

import pytest

from locally.page import progress
from locally.page.progress import Clock, LiveBoard, PlainBoard
from locally.page.runner import Progress


@pytest.fixture
def at(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] = 100.0 + seconds

    return move


def test_the_rest_is_told_once_it_can_be(at):
    clock = Clock()
    assert clock.left(Progress("a", 0.0, "")) == ""
    at(4)
    assert clock.left(Progress("a", 0.5, "")) == ""  # too early
    at(3600)
    assert clock.left(Progress("a", 0.001, "")) == ""  # too little
    assert clock.left(Progress("a", 0.25, "")) == "about 3 h left"
    assert clock.left(Progress("a", 0.99, "")) == "about 36 s left"
    assert clock.left(Progress("a", 0.9, "")) == "about 7 min left"
    at(10 * 86400)
    assert clock.left(Progress("a", 0.5, "")) == "about 10 d left"


def test_a_pipe_gets_a_line_now_and_then(at, capsys):
    board = PlainBoard(["long"])
    for seconds in range(0, 1000, 10):
        at(seconds)
        board.progress(Progress("long", 0.05 + seconds / 2000, "seeds"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("long: 2")
    assert "seeds, about" in lines[0]


def test_the_table_tells_it_too(at):
    board = LiveBoard(["long"])
    board.progress(Progress("long", 0.0, "seeds"))
    board._state("long")
    at(60)
    board.progress(Progress("long", 0.5, "seeds"))
    assert board._state("long")[2] == "seeds · about 60 s left"
