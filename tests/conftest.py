"""What tests of several rooms share."""

from concurrent.futures import Future

import pytest

from loop.models.sam_weights import Architecture


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


@pytest.fixture(scope="session")
def small_sam() -> Architecture:
    """Sizes of a Segment Anything that a test builds, stores and asks in no time."""
    return Architecture(
        width=32,
        depth=2,
        heads=4,
        mlp_ratio=4.0,
        image_size=64,
        patch=16,
        window=3,
        global_blocks=(1,),
        embedding=16,
        mask_channels=8,
        masks=3,
        decoder_depth=2,
        decoder_mlp=24,
        iou_depth=3,
        iou_width=12,
    )
