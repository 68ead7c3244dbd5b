"""Strategies that no user can have, to test a replay: one must win, one must tie with random, one must lose."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from loop.metrics.instance import image_ap
from loop.types import Candidate, Instances, Sample

Control = Callable[[Sequence[Candidate], Mapping[str, Instances], Mapping[str, Sample], np.random.Generator], list[str]]


def true_error(
    candidates: Sequence[Candidate],
    offered: Mapping[str, Instances],
    truth: Mapping[str, Sample],
    rng: np.random.Generator,
) -> list[str]:
    """Ids of the candidates, those first on which the model's cells are in truth the worst (lowest AP)."""
    return _by({c.image_id: -image_ap(offered[c.image_id], truth[c.image_id].instances) for c in candidates})


def shuffled(
    candidates: Sequence[Candidate],
    offered: Mapping[str, Instances],
    truth: Mapping[str, Sample],
    rng: np.random.Generator,
) -> list[str]:
    """Ids of the candidates by uncertainties that were dealt out anew among them: chance in the guise of a score."""
    names = sorted(c.image_id for c in candidates)
    scores = np.array([c.uncertainty for c in sorted(candidates, key=lambda c: c.image_id)])
    return _by(dict(zip(names, rng.permutation(scores).tolist(), strict=True)))


def emptiest(
    candidates: Sequence[Candidate],
    offered: Mapping[str, Instances],
    truth: Mapping[str, Sample],
    rng: np.random.Generator,
) -> list[str]:
    """Ids of the candidates, those first that have the fewest cells in truth."""
    return _by({c.image_id: -float(len(truth[c.image_id].instances)) for c in candidates})


def _by(value: Mapping[str, float]) -> list[str]:
    return sorted(value, key=lambda name: (-value[name], name))


CONTROLS: dict[str, Control] = {"true_error": true_error, "shuffled": shuffled, "emptiest": emptiest}
