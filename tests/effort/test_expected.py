"""What a person is expected to do to a prediction."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.config import EffortConfig
from loop.effort.cost import CostModel
from loop.effort.edits import Edits, Outcome
from loop.effort.expected import Rates, expected_edits, expected_seconds, learn_rates
from loop.errors import NonFiniteError
from loop.types import Instances

PRIOR = Rates.prior()
COST = CostModel.prior(EffortConfig())


def prediction(scores: list[float]) -> Instances:
    return Instances.build(
        (4, 4), [(0, 0, 2, 2)] * len(scores), [np.ones((2, 2), bool)] * len(scores), scores=scores, image_id="slide-7"
    )


def outcome(scores: list[float], fates: str, added: int) -> Outcome:
    """What became of cells: k = kept, e = edited, d = deleted."""
    letters = np.array(list(fates), dtype="<U1")
    iou = np.where(letters == "d", 0.0, 0.8)
    return Outcome(np.array(scores, np.float32), iou, letters == "k", letters == "e", np.ones(added, bool))


def test_prior_by_hand() -> None:
    edits = expected_edits(prediction([0.99, 0.99, 0.3]), PRIOR)

    assert edits == pytest.approx(Edits(kept=1.95, edited=0.45, deleted=0.6, added=1.3))
    assert expected_seconds(prediction([0.99, 0.99, 0.3]), COST, PRIOR) == pytest.approx(
        8 + 0.5 * 1.95 + 6 * 0.45 + 1.5 * 0.6 + 8 * 1.3
    )


def test_an_empty_prediction_still_takes_time() -> None:
    assert expected_edits(prediction([]), PRIOR) == Edits(0, 0, 0, PRIOR.added_per_image)
    assert expected_seconds(prediction([]), COST, PRIOR) == pytest.approx(8 + 8 * 1.0)


def test_no_image_takes_no_time_at_all() -> None:
    """0 s would mean that nobody knows how long it takes, which strategies refuse where others' time is known."""
    learnt = CostModel(0.0, 0.5, 6.0, 1.5, 8.0, images=30)
    rates = Rates(PRIOR.edges, PRIOR.kept, PRIOR.edited, added_per_cell=0.1, added_per_image=0.0, images=30)

    assert expected_seconds(prediction([]), learnt, rates) == 0.1
    assert expected_seconds(prediction([0.99]), learnt, rates) > 0.1


def test_without_history_the_rates_are_the_prior() -> None:
    assert learn_rates([]) == PRIOR


def test_rates_of_one_bin_by_hand() -> None:
    """Four cells of a score above 0.95: the prior's 20 x (0.85, 0.1) and one kept, two edited of four."""
    learnt = learn_rates([outcome([0.99] * 4, "keed", 0)])

    assert learnt.kept[-1] == pytest.approx((20 * 0.85 + 1) / 24)
    assert learnt.edited[-1] == pytest.approx((20 * 0.1 + 2) / 24)
    assert learnt.kept[:-1] == pytest.approx(PRIOR.kept[:-1])
    assert learnt.images == 1


def test_an_image_of_a_thousand_cells_weighs_as_ten() -> None:
    few, many = learn_rates([outcome([0.6] * 10, "d" * 10, 0)]), learn_rates([outcome([0.6] * 1000, "d" * 1000, 0)])

    assert many.kept == pytest.approx(few.kept)
    assert few.kept[1] == pytest.approx(20 * 0.45 / 30)


def test_much_history_outweighs_the_prior() -> None:
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(400):
        n = int(rng.integers(0, 30))
        scores = rng.choice([0.4, 0.9], n)
        fates = "".join("k" if rng.random() < (0.9 if score > 0.5 else 0.1) else "d" for score in scores)
        seen.append(outcome(scores.tolist(), fates, int(rng.poisson(3 + 0.25 * n))))

    learnt = learn_rates(seen)

    assert learnt.kept[0] == pytest.approx(0.1, abs=0.02)
    assert learnt.kept[3] == pytest.approx(0.9, abs=0.02)
    assert learnt.added_per_image == pytest.approx(3, rel=0.1)
    assert learnt.added_per_cell == pytest.approx(0.25, rel=0.1)
    assert expected_edits(prediction([0.4, 0.9]), learnt).kept == pytest.approx(1.0, abs=0.03)


def test_history_of_empty_predictions_teaches_what_is_added() -> None:
    learnt = learn_rates([outcome([], "", 6)] * 200)

    assert learnt.added_per_image == pytest.approx(6, rel=0.1)
    assert learnt.kept == pytest.approx(PRIOR.kept)


def test_doubtful_cells_take_longer() -> None:
    seconds = [expected_seconds(prediction([score] * 10), COST, PRIOR) for score in (0.99, 0.9, 0.8, 0.6)]

    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 4


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused_by_name(score: float) -> None:
    with pytest.raises(NonFiniteError, match="slide-7"):
        expected_edits(prediction([0.5, score]), PRIOR)
    with pytest.raises(NonFiniteError, match="earlier"):
        learn_rates([outcome([score], "k", 0)])


scores_of = st.lists(st.floats(0, 1, width=32), max_size=20)
history = st.lists(
    st.tuples(scores_of, st.integers(0, 50)).flatmap(
        lambda pair: st.text("ked", min_size=len(pair[0]), max_size=len(pair[0])).map(
            lambda fates: outcome(pair[0], fates, pair[1])
        )
    ),
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(history, scores_of, st.floats(0, 1, width=32))
def test_expectations_after_any_history(seen: list[Outcome], scores: list[float], one_more: float) -> None:
    learnt = learn_rates(seen)

    edits = expected_edits(prediction(scores), learnt)

    assert min(edits) >= 0
    assert edits.kept + edits.edited + edits.deleted == pytest.approx(len(scores))
    assert all(
        0 <= kept <= 1 and kept + edited <= 1 + 1e-9 for kept, edited in zip(learnt.kept, learnt.edited, strict=True)
    )
    more = expected_seconds(prediction([*scores, one_more]), COST, learnt)
    assert more >= expected_seconds(prediction(scores), COST, learnt)
