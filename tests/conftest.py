"""What tests of several rooms share."""

from concurrent.futures import Future

import pytest


class Inline:
    """Stands for a pool of processes: everything is done at once in this one."""

    def __init__(self, workers, context, initializer, initargs):
        initializer(*initargs)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def submit(self, function, *given):
        future = Future()
        try:
            future.set_result(function(*given))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **how):
        return None


@pytest.fixture
def inline_pool(monkeypatch):
    """Replays play in this process; nothing is kept of the data of an earlier one."""
    from loop.replay import jobs

    monkeypatch.setattr(jobs, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(jobs, "_bench", [])
