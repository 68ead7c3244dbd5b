import copy
import json

import numpy as np
import pytest
from scipy.stats import ttest_rel

from loop.errors import InputError
from loop.replay.summary import mean_curve, summarise


def run(seed, cells, ap, macro=None):
    n = len(cells)
    return {
        "seed": seed,
        "images": [4 * (i + 1) for i in range(n)],
        "cells": cells,
        "seconds": [10.0 * c for c in cells],
        "ap": ap,
        "macro_ap": macro or [value / 2 for value in ap],
    }


def document():
    """Two seeds; `entropy` asks for more cells a round than the baseline and is better at equal cost."""
    return {
        "full": {"ap": 1.0, "macro_ap": 0.5},
        "strategies": {
            "foreground_random": {
                "seeds": [run(0, [100, 200, 300], [0.2, 0.4, 0.6]), run(1, [120, 200, 320], [0.2, 0.6, 0.8])]
            },
            "entropy": {"seeds": [run(0, [100, 250, 400], [0.2, 0.8, 1.0]), run(1, [120, 300, 500], [0.2, 0.8, 1.0])]},
        },
    }


def noisy(level, seed, seeds=6):
    rng = np.random.default_rng(seed)
    cells = [50, 120, 200, 300]
    return {
        "seeds": [run(s, cells, [0.2, *(level + rng.normal(0, 0.01, 3)).tolist()]) for s in range(seeds)],
    }


def test_areas_by_hand_up_to_the_cost_that_all_have_reached():
    done = summarise(document())["strategies"]
    # seed 0 up to 300: the baseline (0.3 + 0.5) x 100 over 200; entropy is at 0.8 + 0.2 / 3 there
    base = 0.4
    best = ((0.2 + 0.8) / 2 * 150 + (0.8 + 0.8 + 0.2 / 3) / 2 * 50) / 200
    area = done["entropy"]["aubc"]["cells"]["ap"]
    assert done["foreground_random"]["aubc"]["cells"]["ap"]["per_seed"][0] == pytest.approx(base)
    assert area["per_seed"][0] == pytest.approx(best)
    # seed 1 up to 320
    other = ((0.2 + 0.8) / 2 * 180 + (0.8 + 0.82) / 2 * 20) / 200
    assert area["per_seed"][1] == pytest.approx(other)
    assert done["entropy"]["aubc_cells"] == pytest.approx((best + other) / 2)
    assert area["sd"] == pytest.approx(np.std([best, other], ddof=1))
    assert done["entropy"]["aubc_cells_macro"] == pytest.approx((best + other) / 4)
    # by images both go to 12, by trapezoids of equal width; seconds are cells times ten here
    assert done["entropy"]["aubc_images"] == pytest.approx((0.1 + 0.8 + 0.5) / 2)
    assert done["entropy"]["aubc_seconds"] == pytest.approx(done["entropy"]["aubc_cells"])


def test_goals_by_hand_on_the_mean_curve():
    done = summarise(document())["strategies"]
    # entropy: mean cells 110, 275, 450, mean ap 0.2, 0.8, 1.0: 0.9 is half way of the last step
    assert done["entropy"]["cells_to_90"] == pytest.approx(362.5)
    assert done["entropy"]["cells_to_95"] == pytest.approx(406.25)
    assert done["entropy"]["cells_to_90_macro"] == pytest.approx(362.5)
    assert done["entropy"]["images_to_90"] == pytest.approx(10)
    assert done["foreground_random"]["cells_to_90"] is None
    assert done["entropy"]["cells_to_90_ratio"] is None
    easier = document() | {"full": {"ap": 0.7, "macro_ap": 0.7}}
    done = summarise(easier)["strategies"]
    # 0.63: the baseline has 0.5 at 200 and 0.7 at 310; entropy 0.2 at 110 and 0.8 at 275
    slow, fast = 200 + 110 * 0.13 / 0.2, 110 + 165 * 0.43 / 0.6
    assert done["foreground_random"]["cells_to_90"] == pytest.approx(slow)
    assert done["entropy"]["cells_to_90_ratio"] == pytest.approx(fast / slow)
    assert done["foreground_random"]["cells_to_90_ratio"] == pytest.approx(1)
    assert done["entropy"]["cells_to_90_macro"] is None


def test_the_end_of_each_and_its_rate():
    done = summarise(document())["strategies"]
    assert done["foreground_random"]["final"]["ap"] == {
        "mean": pytest.approx(0.7),
        "sd": pytest.approx(np.std([0.6, 0.8], ddof=1)),
        "per_seed": [0.6, 0.8],
    }
    assert done["entropy"]["foreground_efficiency"] > done["foreground_random"]["foreground_efficiency"] > 0


def test_foreground_counts_where_it_is_given():
    given = document()
    for entry in given["strategies"].values():
        for own in entry["seeds"]:
            own["foreground"] = [1000 * c for c in own["cells"]]
    done = summarise(given)["strategies"]["entropy"]
    assert done["foreground_efficiency_area"] == pytest.approx(done["foreground_efficiency"] / 1000, rel=1e-4)
    assert "foreground_efficiency_area" not in summarise(document())["strategies"]["entropy"]


def test_comparison_with_the_baseline_over_all_and_over_the_pair():
    given = {"full": {"ap": 1.0, "macro_ap": 0.5}, "strategies": {}}
    given["strategies"] = {"random": noisy(0.4, 1), "foreground_random": noisy(0.5, 2), "celloop": noisy(0.6, 3)}
    # one that asks for hardly any cell narrows what all have in common, not what two have
    given["strategies"]["emptiest"] = {"seeds": [run(s, [50, 51, 52, 55], [0.2, 0.2, 0.2, 0.2]) for s in range(6)]}
    done = summarise(given)["strategies"]
    versus = done["celloop"]["versus"]["foreground_random"]
    areas = [done[name]["aubc"]["cells"]["ap"]["per_seed"] for name in ("celloop", "foreground_random")]
    wide, narrow = versus["aubc_cells_pair"]["ap"], versus["aubc_cells"]["ap"]
    assert narrow["difference"] == pytest.approx(np.mean(areas[0]) - np.mean(areas[1]))
    assert narrow["p_t"] == pytest.approx(float(ttest_rel(*areas).pvalue))
    assert wide["difference"] == pytest.approx(0.1 * 215 / 250, abs=0.02)
    assert wide["difference"] > narrow["difference"]
    assert wide["p_t"] < 0.01
    assert wide["p_permutation"] == pytest.approx(2 / 64)
    assert wide["seeds"] == 6
    assert versus["final"]["ap"]["difference"] == pytest.approx(0.1, abs=0.02)
    assert set(done["celloop"]["versus"]) == {"foreground_random", "random"}
    assert set(done["random"]["versus"]) == {"foreground_random"}


def test_who_beats_whom():
    given = {"full": {"ap": 1.0, "macro_ap": 0.5}, "strategies": {"low": noisy(0.4, 1), "high": noisy(0.6, 2)}}
    done = summarise(given)
    assert done["penalty_matrix"] == {"low": {"low": 0.0, "high": 0.0}, "high": {"low": 1.0, "high": 0.0}}
    assert done["loses"] == {"low": 1.0, "high": 0.0}
    assert done["penalty_matrix_macro"]["high"]["low"] == 1.0
    assert done["notes"] == []


def test_one_seed_says_what_it_cannot_say():
    given = document()
    for entry in given["strategies"].values():
        del entry["seeds"][1]
    done = summarise(given)
    assert done["penalty_matrix"] == {}
    assert "2 seeds" in done["notes"][0]
    compared = done["strategies"]["entropy"]["versus"]["foreground_random"]["aubc_cells"]["ap"]
    assert compared["difference"] > 0
    assert compared["p_t"] is None
    assert done["strategies"]["entropy"]["aubc"]["cells"]["ap"]["sd"] is None


def test_only_shared_seeds_are_paired():
    given = document()
    given["strategies"]["entropy"]["seeds"].append(run(2, [90, 200], [0.1, 0.2]))
    done = summarise(given)
    assert done["strategies"]["entropy"]["versus"]["foreground_random"]["final"]["ap"]["seeds"] == 2
    assert len(done["strategies"]["entropy"]["aubc"]["cells"]["ap"]["per_seed"]) == 3
    assert done["penalty_matrix"]["entropy"]


def test_a_strategy_that_never_asks_for_a_cell():
    given = document()
    given["strategies"]["emptiest"] = {"seeds": [run(0, [100] * 3, [0.2, 0.1, 0.1]), run(1, [120] * 3, [0.2] * 3)]}
    done = summarise(given)
    assert done["strategies"]["emptiest"]["aubc_cells"] is None
    assert done["strategies"]["emptiest"]["aubc_images"] == pytest.approx((0.125 + 0.2) / 2)
    assert done["strategies"]["entropy"]["aubc_cells"] is None
    assert done["strategies"]["entropy"]["versus"]["foreground_random"]["aubc_cells_pair"]["ap"]["difference"] > 0
    assert done["penalty_matrix"] == {}
    assert "never asked" in done["notes"][0]


def test_without_full_supervision_and_without_macro():
    given = document() | {"full": None}
    for entry in given["strategies"].values():
        for own in entry["seeds"]:
            del own["macro_ap"]
    done = summarise(given)
    entry = done["strategies"]["entropy"]
    assert entry["cells_to_90"] is None
    assert entry["foreground_efficiency"] is None
    assert "aubc_cells_macro" not in entry
    assert "penalty_matrix_macro" not in done
    assert any("full supervision" in note for note in done["notes"])


def test_the_document_is_json_keeps_what_it_had_and_is_not_changed():
    given = document() | {"config": {"seeds": 2}}
    before = copy.deepcopy(given)
    done = summarise(given)
    assert given == before
    again = json.loads(json.dumps(done, allow_nan=False))
    assert again["config"] == {"seeds": 2}
    assert again["strategies"]["entropy"]["seeds"] == before["strategies"]["entropy"]["seeds"]
    assert {"aubc_cells", "aubc_images", "cells_to_90", "cells_to_95"} <= set(again["strategies"]["entropy"])
    assert summarise(done) == done


def test_mean_curve_by_hand():
    cost, score, spread = mean_curve(document()["strategies"]["entropy"]["seeds"], "cells", "ap")
    assert cost.tolist() == [110, 275, 450]
    np.testing.assert_allclose(score, [0.2, 0.8, 1.0])
    np.testing.assert_allclose(spread, 0, atol=1e-12)


def test_runs_that_do_not_fit_are_refused():
    given = document()
    given["strategies"]["entropy"]["seeds"][0]["ap"] = [0.2]
    with pytest.raises(InputError, match="one value a round"):
        summarise(given)
    given = document()
    given["strategies"]["entropy"]["seeds"][1]["cells"][0] = 121
    with pytest.raises(InputError, match="same first images"):
        summarise(given)
    with pytest.raises(InputError, match="at least one run"):
        summarise({"full": None, "strategies": {"a": {"seeds": []}}})
    with pytest.raises(InputError, match="at least one run"):
        summarise({"full": None, "strategies": {}})
