"""How long work says how far it is, to whoever listens: a terminal (flows/cli/progress.py), a log, nobody."""

from collections.abc import Callable
from typing import Protocol

from loop.config import TrainConfig


class Tell(Protocol):
    """Called now and then as tell(step, done, total)."""

    def __call__(self, step: str, done: int, total: int, *, note: str = "", seconds_left: float | None = None) -> None:
        """`done` of `total` units of `step` are done; a note of how it goes; what is left, where the work knows it."""


def quiet(step: str, done: int, total: int, *, note: str = "", seconds_left: float | None = None) -> None:
    """Tells nobody."""


def telling_training(tell: Tell, config: TrainConfig) -> Callable[[int, dict[str, float]], None]:
    """A `log` for `loop.training.trainer.train` that tells loss, validation AP and the time left."""
    last: dict[str, float] = {}
    budget_s = round(config.minutes * 60)

    def log(step: int, values: dict[str, float]) -> None:
        last.update(values)
        note = f"loss {last['loss']:.3f}" if "loss" in last else ""
        if "validation_ap" in last:
            note += f" AP {last['validation_ap']:.3f}"
        left = last.get("seconds_left")
        if config.max_steps:
            tell("training (steps)", step, config.max_steps, note=note, seconds_left=left)
        else:
            tell("train", min(budget_s, round(last.get("seconds", 0.0))), budget_s, note=note, seconds_left=left)

    return log
