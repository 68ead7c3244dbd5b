"""A batch for several people: each gets a share of his own, and a few images two of them see."""

from collections.abc import Mapping, Sequence

import numpy as np

from loop.acquisition.batch import control_count
from loop.errors import InputError, NonFiniteError
from loop.types import Selection


def deal(
    batch: Sequence[Selection],
    people: Sequence[str],
    *,
    overlap: float,
    seconds: Mapping[str, float],
    rng: np.random.Generator,
) -> dict[str, tuple[str, ...]]:
    """Who labels each image of a batch: one person, or two of them for a share of the batch drawn at random.

    Dealt like cards, the longest first: control images one each in turn, so that nobody has two more than another;
    then the rest, each to the one with the least expected time so far, so that two people's time differs by no more
    than the longest image takes (as far as the control images leave it). A second person is dealt in the same way. An
    image whose seconds are not known counts as much as the others do on average; where none is known, all count alike.

    Args:
        batch: the images, control images among them.
        people: their logins; the first ones get what is left over. None: nothing is dealt.
        overlap: share of the batch that two people label, in [0, 1]; a fraction of an image is drawn by chance, and
            with one person nothing overlaps.
        seconds: expected seconds by image id, > 0; others are not known.
        rng: the only source of randomness.

    Returns:
        Image id -> one or two of `people`, for every image of the batch; {} without people.

    Raises:
        InputError: a person is named twice, or overlap is out of range.
        NonFiniteError: seconds are NaN or infinite; names the image.
    """
    if len(set(people)) != len(people):
        raise InputError(f"people {', '.join(people)}: somebody is named twice; name each once")
    if not 0 <= overlap <= 1:
        raise InputError(f"overlap={overlap}; expected 0 to 1")
    if not people:
        return {}
    cost = _costs(batch, seconds)
    time, controls = dict.fromkeys(people, 0.0), dict.fromkeys(people, 0)
    dealt: dict[str, tuple[str, ...]] = {}

    def give(selection: Selection, others: Sequence[str]) -> None:
        turn = controls if selection.control else time
        person = min(others, key=lambda p: (turn[p], time[p]))
        controls[person] += selection.control
        time[person] += cost[selection.image_id]
        dealt[selection.image_id] = (*dealt.get(selection.image_id, ()), person)

    cards = sorted(batch, key=lambda s: (not s.control, -cost[s.image_id], s.rank))
    for selection in cards:
        give(selection, people)
    n = min(len(batch), control_count(len(batch), overlap, rng)) if len(people) > 1 else 0
    twice = {int(i) for i in rng.permutation(len(cards))[:n]}
    for i in sorted(twice):
        first = dealt[cards[i].image_id]
        give(cards[i], [person for person in people if person not in first])
    return dealt


def _costs(batch: Sequence[Selection], seconds: Mapping[str, float]) -> dict[str, float]:
    known = {s.image_id: seconds[s.image_id] for s in batch if s.image_id in seconds}
    for image_id, value in known.items():
        if not np.isfinite(value):
            raise NonFiniteError(f"the expected seconds of image {image_id!r} are {value}; estimate them again")
    timed = [value for value in known.values() if value > 0]
    usual = sum(timed) / len(timed) if timed else 1.0
    return {s.image_id: known[s.image_id] if known.get(s.image_id, 0.0) > 0 else usual for s in batch}
