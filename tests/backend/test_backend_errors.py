import inspect

import pytest

import backend.errors
import loop.errors
from backend.errors import BusyError, NoModelError, UnknownProjectError, refusal, status_of
from loop.errors import CheckpointError, ImageError, LabelError, LoopError, NonFiniteError, StateError, UnreachableError

EVERY = {
    kind
    for module in (backend.errors, loop.errors)
    for _, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, LoopError)
}


@pytest.mark.parametrize("kind", sorted(EVERY, key=lambda kind: kind.__name__))
def test_every_error_has_an_error_status(kind):
    assert 400 <= status_of(kind("text")) < 600


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (UnknownProjectError, 404),
        (ImageError, 422),
        (LabelError, 400),
        (NoModelError, 503),
        (BusyError, 503),
        (StateError, 409),
        (UnreachableError, 502),
        (NonFiniteError, 500),
        (CheckpointError, 500),
    ],
)
def test_the_nearest_class_counts(kind, status):
    assert status_of(kind("text")) == status


def test_a_refusal_is_short():
    reply = refusal(400, "ImageError", "x" * 10_000)
    assert reply.status_code == 400
    assert len(reply.body) < 1000
