"""How long a training goes on: minutes on a clock that can stand still, or steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loop.config import TrainConfig

Clock = Callable[[], float]


class Budget:
    """The minutes of a training, or its `max_steps` where they are given; the clock starts at once."""

    def __init__(self, config: TrainConfig, clock: Clock, seconds: float = 0.0) -> None:
        """Starts the clock at `seconds`, those that were spent before an interruption."""
        self._config = config
        self._clock = clock
        self._started = clock() - seconds
        self._standing: float | None = None
        self._over = False

    @property
    def seconds(self) -> float:
        """That are spent."""
        return self._clock() - self._started if self._standing is None else self._standing

    def share(self, steps: int) -> float:
        """The share of the budget, from 0, that is spent after so many steps; 1 or more: it is over."""
        if self._config.max_steps:
            return steps / self._config.max_steps
        return self.seconds / (60 * self._config.minutes)

    def left(self, steps: int) -> float:
        """Seconds until it is spent, as the steps so far took; 0 after its end."""
        if self._over:
            return 0.0
        if self._config.max_steps:
            return self.seconds / max(steps, 1) * max(self._config.max_steps - steps, 0)
        return max(60 * self._config.minutes - self.seconds, 0.0)

    def end(self) -> None:
        """Stops the clock for good."""
        self._standing, self._over = self.seconds, True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Between start and end the clock stands still."""
        self._standing = standing = self.seconds
        try:
            yield
        finally:
            self._standing = None
            self._started = self._clock() - standing
