"""The step of the pseudo-labels on a real index: what teaches, what never does, and what switches them off."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pseudo_stage import NAME, Guesser, Stage, blocks, hire, honest, joined, make_stage, of_next_image, shifted

from flows.context import image_ref
from flows.predict import PredictionStore
from flows.prelabels import prelabels
from flows.pseudo import in_reserve, paused, pseudo
from flows.select import select
from loop.adapters.index import AuditRow, RoundRow
from loop.data.predictions import StoredPrediction
from loop.data.snapshot import Snapshot, load_snapshot
from loop.types import Instances, Origin, Selection

FIRST = ("i00", "i01", "i02", "i03", "i04", "i05", "i06", "i07")
SECOND = ("i08", "i09", "i10", "i11", "i12", "i13", "i14", "i15")
SMALL = {"pseudo.audit_cells": 20, "pseudo.calibrate_cells": 20, "pseudo.keep": 0.6}


def ready(tmp_path: Path, n: int = 24, **settings: Any) -> Stage:
    """Eight images that the champion learnt from, and eight more that were labelled since."""
    stage = make_stage(tmp_path, n, **{**SMALL, **settings})
    stage.label(*FIRST)
    stage.learn()
    stage.label(*SECOND)
    return stage


def step(stage: Stage) -> dict[str, Any]:
    """The step in a new round, which is done afterwards."""
    number = stage.context.index.open_round(NAME).number
    document = pseudo(stage.context, number, stage.frozen())
    stage.context.index.update_round(NAME, number, status="done")
    return document


def mixed(stage: Stage, document: dict[str, Any]) -> Snapshot:
    return load_snapshot(stage.context.workspace.snapshots_dir, document["mixed_snapshot"])


def test_sure_cells_of_open_images_teach_with_their_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = ready(tmp_path)
    hire(monkeypatch, champion=Guesser("champion", stage, honest))
    document = step(stage)
    assert document["on"], document["reason"]
    snapshot = mixed(stage, document)
    guessed = snapshot.split("pseudo")
    assert [s.image.image_id for s in guessed] == [f"i{n}" for n in range(16, 24)]
    assert len(snapshot.split("train")) == 16
    for sample in guessed:
        cells = sample.instances
        truth = stage.truth[sample.image.image_id]
        taught = cells.take(np.flatnonzero(cells.weights > 0))
        assert sorted(map(tuple, taught.boxes_xyxy)) == sorted(map(tuple, truth.boxes_xyxy))
        assert cells.origin(0) == Origin("pseudo", "champion:champion-v1")
        assert set(np.flatnonzero(cells.weights > 0)) == set(np.flatnonzero(cells.scores >= 0.6))
    assert document["images"] == 8
    assert document["cells"] == sum(int((s.instances.weights > 0).sum()) for s in guessed)
    assert 0 <= document["ece"] < 0.2
    assert document["labellers"]["champion"] == {"version": "champion-v1", "trust": 1.0, "skipped": []}
    flagged = {row.image_id for row in stage.context.index.images(NAME) if row.pseudo_taught}
    assert flagged == {s.image.image_id for s in guessed}


def test_the_same_labels_give_the_same_snapshot_and_the_document_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = []
    for place in ("a", "b"):
        stage = ready(tmp_path / place)
        hire(monkeypatch, champion=Guesser("champion", stage, honest))
        snapshots.append(step(stage)["mixed_snapshot"])
    assert snapshots[0] == snapshots[1]
    asked = len(stage.asked)
    index = stage.context.index
    measured = {**index.rounds(NAME)[0].pseudo, "mixed_ap": 0.9, "labelled_ap": 0.1, "kinds": {"unet": "promoted"}}
    index.update_round(NAME, 0, pseudo=measured)
    again = step(stage)  # a round after a rollback, on the same labels
    assert not {"mixed_ap", "labelled_ap", "kinds"} & again.keys()
    assert again["mixed_snapshot"] == snapshots[1]
    assert len(stage.asked) == asked


def test_the_hold_out_and_the_reserve_are_never_pseudo_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = ready(tmp_path, n=40, **{"pseudo.reserve": 0.5, "select.control": 0.5, "select.batch": 22})
    stage.label("i16", role="control")
    stage.context.index.set_images(
        NAME, {"i16": {"group": "slide"}, "i17": {"group": "slide"}, "i18": {"taught": True}}
    )
    hire(monkeypatch, champion=Guesser("champion", stage, honest))
    document = step(stage)
    assert document["on"], document["reason"]
    guessed = {s.image.image_id for s in mixed(stage, document).split("pseudo")}
    kept = {i for i in stage.truth if in_reserve(NAME, i, 0.5)}
    assert len(guessed) > 3
    assert not guessed & (kept | {"i16", "i17", "i18"})
    open_ids = [row.image_id for row in stage.context.index.images(NAME, state="open")]
    shown = {i: StoredPrediction(Instances.build((96, 96)), 0.5, np.ones(2, np.float32)) for i in open_ids}
    drawn = select(stage.context, 1, shown)
    control = {selection.image_id for selection in drawn if selection.control}
    assert len(control) > 3
    assert control <= kept
    assert guessed & {selection.image_id for selection in drawn}  # a person may still label them


def test_the_reserve_is_about_its_share_and_does_not_move() -> None:
    drawn = [in_reserve("p", f"g{n}", 0.3) for n in range(2000)]
    assert 0.26 < np.mean(drawn) < 0.34
    assert not any(in_reserve("p", f"g{n}", 0.0) for n in range(100))
    assert all(in_reserve("p", f"g{n}", 0.6) for n in range(2000) if drawn[n])


def test_at_most_so_many_images_and_others_in_another_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = ready(tmp_path, **{"pseudo.images": 3})
    hire(monkeypatch, champion=Guesser("champion", stage, honest))
    first = {s.image.image_id for s in mixed(stage, step(stage)).split("pseudo")}
    stage.label("i16")
    second = {s.image.image_id for s in mixed(stage, step(stage)).split("pseudo")}
    assert (len(first), len(second)) == (3, 3)
    assert first != second


def test_before_a_model_and_without_new_labels_there_is_nothing_to_teach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_stage(tmp_path, n=10, **SMALL)
    hire(monkeypatch, champion=Guesser("champion", stage, honest))
    stage.label("i00", "i01")
    assert step(stage)["reason"] == "off: there is no model in service yet that could propose anything"
    stage.learn()
    stage.label("i02")
    few = step(stage)
    assert few["reason"].startswith("off: the confidence cannot be calibrated in this round: ")
    assert (few["on"], few["mixed_snapshot"], few["ece"]) == (False, "", None)
    stage.learn()
    stage.context.index.set_images(NAME, {"i01": {"state": "open"}})
    assert "no labelled image is new to the labellers" in step(stage)["reason"]


def test_switched_off_by_the_settings_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = ready(tmp_path, **{"pseudo.teach": False})
    hire(monkeypatch, champion=Guesser("champion", stage, honest))
    assert step(stage)["reason"] == "off: pseudo.teach is off in the settings"
    assert stage.asked == []


def test_several_labellers_are_calibrated_to_be_shown_though_none_teaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = ready(tmp_path, **{"pseudo.teach": False, "pseudo.labellers": ("champion", "cellpose")})
    hire(monkeypatch, champion=Guesser("champion", stage, honest), cellpose=Guesser("cellpose", stage, honest))
    document = step(stage)
    assert not document["on"]
    assert "only shown" in document["reason"]
    assert document["calibrator"]


def test_shuffled_pseudo_labels_are_switched_off_by_the_audit_and_recover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = ready(tmp_path, n=30)

    def turns_bad(stage: Stage, image_id: str) -> Instances:
        """Right on what people have labelled, shuffled on what nobody has looked at yet."""
        return honest(stage, image_id) if image_id < "i16" else of_next_image(stage, image_id)

    hire(monkeypatch, champion=Guesser("champion", stage, turns_bad, confident=True))
    fooled = step(stage)
    assert fooled["on"]
    stage.label("i16", "i17", "i18", "i19")
    caught = step(stage)
    assert not caught["on"]
    assert caught["audits"]["champion"]["precision"] < 0.3
    assert "champion switched off by the audit: precision 0." in caught["reason"]
    assert caught["labellers"]["champion"]["trust"] == 0.0
    # What it would have taught is kept while it is off, so that it can be found to be right again.
    hire(monkeypatch, champion=Guesser("champion", stage, honest, version="champion-v2"))
    stage.label("i20")
    assert not step(stage)["on"]
    stage.label("i21", "i22", "i23", "i24")
    back = step(stage)
    assert back["audits"]["champion"]["precision"] > 0.9
    assert back["on"], back["reason"]


def test_one_that_shifts_every_mask_loses_its_say_and_the_honest_one_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = ready(tmp_path, **{"pseudo.labellers": ("champion", "cellpose")})
    moved = Guesser("cellpose", stage, lambda stage, i: shifted(stage.truth[i]))
    hire(monkeypatch, champion=Guesser("champion", stage, honest), cellpose=moved)
    assert step(stage)["on"]
    stage.label("i16", "i17", "i18", "i19")
    document = step(stage)
    audits = document["audits"]
    assert audits["champion"]["teaches"]
    assert audits["champion"]["precision"] > 0.9
    assert audits["cellpose"]["precision"] is None or audits["cellpose"]["precision"] < 0.6
    assert document["labellers"]["champion"]["trust"] > 0.9
    assert document["on"]
    guessed = mixed(stage, document).split("pseudo")
    taught = [cells.origin(i).by for _, cells, *_ in guessed for i in np.flatnonzero(cells.weights > 0)]
    assert set(taught) == {"champion:champion-v1"}


def test_an_image_that_cannot_be_read_and_a_labeller_that_fails_cost_only_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage = ready(tmp_path)
    Path(stage.context.index.image(NAME, "i16").path).unlink()

    def breaks(stage: Stage, image_id: str) -> Instances:
        if image_id == "i17":
            raise ValueError("negative dimension")
        return honest(stage, image_id)

    hire(monkeypatch, champion=Guesser("champion", stage, breaks))
    document = step(stage)
    assert document["on"]
    assert [s.image.image_id for s in mixed(stage, document).split("pseudo")] == [f"i{n}" for n in range(18, 24)]
    assert document["labellers"]["champion"]["skipped"] == ["i17: negative dimension"]
    assert "i16 is not looked at" in caplog.text


def test_images_without_a_sure_cell_are_no_more_a_source_of_the_hold_out_than_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = ready(tmp_path, n=36, **{"select.control": 0.5, "select.batch": 20})
    hire(monkeypatch, champion=Guesser("champion", stage, lambda s, i: honest(s, i) if i < "i26" else blocks(i)))
    assert step(stage)["images"] == 10
    open_ids = [row.image_id for row in stage.context.index.images(NAME, state="open")]
    shown = {i: StoredPrediction(Instances.build((96, 96)), 0.5, np.ones(2, np.float32)) for i in open_ids}
    assert not any(selection.control for selection in select(stage.context, 1, shown))


def test_one_that_is_off_recovers_by_its_own_cells_and_not_by_those_that_others_found_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = ready(tmp_path, **{"pseudo.labellers": ("champion", "cellpose")})

    def half_wrong(stage: Stage, image_id: str) -> Instances:
        """On what nobody has looked at yet, as many cells that nobody would draw."""
        return joined(stage.truth[image_id], blocks(image_id, 30)) if image_id >= "i16" else honest(stage, image_id)

    guesser = Guesser("cellpose", stage, half_wrong, confident=True)
    hire(monkeypatch, champion=Guesser("champion", stage, honest), cellpose=guesser)
    stage.context.index.put_audits(NAME, [AuditRow(1, 0, "cellpose", "cellpose-v1", cells=40, hits=4, truths=40)])
    stage.context.index.open_round(NAME)
    stage.context.index.update_round(NAME, 0, status="done")
    assert step(stage)["labellers"]["cellpose"]["trust"] == 0.0
    stage.label("i16", "i17", "i18", "i19")
    found = step(stage)["audits"]["cellpose"]
    assert found["cells"] > 24 / 0.6  # the 24 cells of four images that it shares with the champion, and its own
    assert not found["teaches"]


def test_a_handful_of_sure_cells_does_not_teach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = ready(tmp_path, **{"pseudo.images": 1})
    hire(monkeypatch, champion=Guesser("champion", stage, honest))
    document = step(stage)
    assert not document["on"]
    assert document["reason"] == (
        "off: only 6 cells in 1 unlabelled images are sure enough to teach, fewer than 10% of the 96 by people"
    )
    assert not any(row.pseudo_taught for row in stage.context.index.images(NAME))


def done(number: int, **metrics: float) -> RoundRow:
    return RoundRow(1, number, status="done", metrics=metrics)


def test_pseudo_labels_pause_for_a_round_after_two_that_did_harm() -> None:
    good, bad = {"mixed_ap": 0.6, "labelled_ap": 0.5}, {"mixed_ap": 0.4, "labelled_ap": 0.5}
    assert paused([]) == ""
    assert paused([done(1, **bad)]) == ""
    assert paused([done(1, **bad), done(2, **good)]) == ""
    fair = paused([done(1, **good), done(2, **bad), done(3, **bad)])
    assert fair.startswith("the model with them was worse on the hold-out in the last 2 rounds that compared (-0.1")
    assert "of the training" not in fair
    biased = paused([done(2, **bad), done(3, **bad, labelled_share=0.5)])
    assert "though the one without had 50% of the training" in biased
    rested = [done(1, **bad), done(2, **bad), done(3, ap=0.5)]
    assert paused(rested) == ""
    assert paused([*rested, done(4, **bad)]) != ""
    assert paused([*rested, done(4, **good)]) == ""


def stored(stage: Stage) -> dict[str, StoredPrediction]:
    """What the champion itself says of the open images: a cell each."""
    store = PredictionStore(stage.context.workspace.predictions_dir, f"celloop-{NAME}-v1")
    found = {}
    for row in stage.context.index.images(NAME, state="open"):
        cells = replace(stage.truth[row.image_id].take([0]), source="model")
        found[row.image_id] = StoredPrediction(cells, 0.3, np.ones(4, np.float32))
        store.save(image_ref(row), found[row.image_id])
    return found


def test_people_are_shown_fused_cells_with_their_confidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = ready(tmp_path)
    hire(monkeypatch, champion=Guesser("champion", stage, honest))
    champion, predictions = stage.registry.current, stored(stage)
    assert champion is not None
    assert prelabels(stage.context, champion, predictions, []) == (predictions, frozenset())
    step(stage)
    published, calibrated = prelabels(stage.context, champion, predictions, [Selection("i20", 1, False, "")])
    assert calibrated == published.keys()
    for image_id, prediction in published.items():
        assert len(prediction.instances) >= len(stage.truth[image_id])
        assert prediction.instances.scores.min() >= stage.context.config.pseudo.doubt
        assert (prediction.uncertainty, list(prediction.embedding)) == (0.3, [1.0] * 4)


def test_of_a_large_pool_the_batch_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = ready(tmp_path, **{"pseudo.images": 1})
    hire(monkeypatch, champion=Guesser("champion", stage, honest))
    step(stage)
    champion, predictions = stage.registry.current, stored(stage)
    assert champion is not None
    published, calibrated = prelabels(stage.context, champion, predictions, [Selection("i22", 1, False, "")])
    assert [i for i in published if published[i] is not predictions[i]] == ["i22"]
    assert calibrated == {"i22"}


def test_a_calibrator_holds_for_who_it_was_fitted_for_and_for_who_replaced_them_just_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = ready(tmp_path)
    hire(monkeypatch, champion=Guesser("champion", stage, honest))
    first, predictions = stage.registry.current, stored(stage)
    assert first is not None
    assert step(stage)["calibrator"]
    hire(monkeypatch, champion=Guesser("champion", stage, honest, version="champion-v2"))
    second = stage.learn()  # promoted by that round
    assert prelabels(stage.context, second, predictions, [])[1]
    other = replace(second, tags={**second.tags, "network": "sparse_seu_net"})
    assert prelabels(stage.context, other, predictions, []) == (predictions, frozenset())
    stage.label("i16")
    stage.learn()
    assert not step(stage)["calibrator"]  # all labels are learnt from by now
    assert prelabels(stage.context, second, predictions, []) == (predictions, frozenset())
    hire(monkeypatch, champion=Guesser("champion", stage, honest))
    assert prelabels(stage.context, first, predictions, [])[1]  # rolled back to the one that it was fitted for
