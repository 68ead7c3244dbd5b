import io

import pytest
from rich.console import Console

from flows.cli import progress
from flows.telling import telling_training
from loop.config import TrainConfig


@pytest.fixture
def shown(monkeypatch):
    """Gives a function that makes a console of that kind and returns what is written to it."""

    def make(*, terminal):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=80, highlight=False, color_system=None)
        monkeypatch.setattr(progress, "console", lambda: console)
        monkeypatch.setattr("flows.cli.console.console", lambda: console)
        return file

    return make


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "0:00:07"), (3725, "1:02:05"), (-3, "0:00:00")])
def test_a_clock_by_hand(seconds, text):
    assert progress.clock(seconds) == text


def test_a_training_on_a_terminal_shows_loss_ap_and_time_left_in_80_columns(shown):
    file = shown(terminal=True)
    with progress.telling() as tell:
        log = telling_training(tell, TrainConfig(minutes=10))
        log(10, {"loss": 0.5, "seconds": 30.0, "seconds_left": 570.0})
        log(20, {"loss": 0.25, "seconds": 60.0, "seconds_left": 540.0, "validation_ap": 0.375})
    text = file.getvalue()
    lines = [line for line in text.replace("\r", "\n").splitlines() if "0.375" in line]
    assert lines
    for part in ("training (seconds)", "60/600", "0:09:00", "loss 0.250 AP 0.375"):
        assert part in lines[-1]


def test_lines_where_there_is_no_terminal(shown, monkeypatch):
    file = shown(terminal=False)
    now = iter([0.0, 5.0, 16.0, 17.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.telling() as tell:
        log = telling_training(tell, TrainConfig(max_steps=40))
        log(10, {"loss": 0.5})
        log(20, {"loss": 0.4})
        log(30, {"loss": 0.3, "validation_ap": 0.125, "seconds_left": 9.0})
        tell("predict", 1, 1)
    assert file.getvalue().splitlines() == [
        "training (steps): 10 of 40, loss 0.500",
        "training (steps): 30 of 40, loss 0.300 AP 0.125, 0:00:09 left",
        "predicting images: 1 of 1",
    ]


def test_work_that_knows_no_time_left_gets_an_estimate(shown):
    file = shown(terminal=True)
    with progress.telling() as tell:
        tell("images", 1, 4)
        tell("images", 2, 4)
    assert "preparing images" in file.getvalue()
    assert "2/4" in file.getvalue()
