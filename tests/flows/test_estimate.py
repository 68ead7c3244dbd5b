"""The live estimate on drawn images: what models of random images are compared on, its document, and running twice."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pseudo_stage import NAME, Stage, make_stage

from flows import against_random, estimate
from flows.advice import advise
from flows.against_random import plan, work_seconds
from flows.context import group_of, image_ref
from flows.estimate import interval_of
from flows.round import _begun
from loop.acquisition.batch import FIRST_REASON
from loop.adapters.index import AnnotationRow
from loop.adapters.mlflow_registry import ModelVersion
from loop.config import EffortConfig
from loop.data.predictions import PredictionStore, StoredPrediction
from loop.data.store import write_png
from loop.errors import ImageError, NonFiniteError, ServiceError
from loop.uncertainty.measures import FROM_ONE_LOOK

QUICK = {"model.base": 4, "model.depth": 2, "train.max_steps": 4, "train.crop": 32, "train.batch": 1}
CONTROL, FIRST, CHOSEN = range(8), range(8, 10), range(10, 16)


def name(i: int) -> str:
    return f"i{i:02d}"


def every(numbers: range, **fields: Any) -> dict[str, dict[str, Any]]:
    return {name(i): fields for i in numbers}


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """Eight hold-out images in six groups, two random and six chosen ones that teach, four open ones."""
    stage = make_stage(tmp_path, n=20, cells=4, **QUICK, **{"estimate.min_images": 8})
    index = stage.context.index
    stage.label(*map(name, CONTROL), role="control")
    stage.label(*map(name, [*FIRST, *CHOSEN]))
    groups = {name(i): {"group": f"slide{i // 2}"} for i in range(4)}
    first = {name(i): {"reason": FIRST_REASON, "chosen_in": 0, "rank": i} for i in FIRST}
    chosen = {name(i): {"reason": "unlike anything labelled", "chosen_in": 1, "rank": 20 - i} for i in CHOSEN}
    for update in (groups, first, chosen):
        index.set_images(NAME, update)
    return stage


def ids(samples: Any) -> list[str]:
    return [sample.image.image_id for sample in samples]


def planned(stage: Stage, **lead: float) -> Any:
    annotations = {image_id: timed(image_id, seconds) for image_id, seconds in lead.items()}
    return plan(stage.context, stage.frozen(), annotations)


def timed(image_id: str, seconds: float | None) -> AnnotationRow:
    return AnnotationRow(1, 1, image_id, 1, np.datetime64(0, "s").item(), "", 4, seconds)


def test_both_models_start_alike_cost_the_same_and_learn_from_no_group_that_they_are_measured_on(stage: Stage) -> None:
    folds = planned(stage)
    rows = {row.image_id: row for row in stage.context.index.images(NAME)}
    measured = [set(ids(fold.measured)) for fold in folds]
    assert measured[0] | measured[1] == set(map(name, CONTROL))
    assert not measured[0] & measured[1]
    assert sorted(map(len, measured)) == [4, 4]
    for fold, other in zip(folds, measured[::-1], strict=True):
        groups = {group_of(rows[image_id]) for image_id in ids(fold.measured)}
        for arm in (fold.random, fold.chosen):
            assert not groups & {group_of(rows[image_id]) for image_id in ids(arm.samples)}
            assert ids(arm.samples)[:2] == ["i08", "i09"]
        assert set(ids(fold.random.samples)[2:]) == other
        assert ids(fold.chosen.samples)[2:] == ["i15", "i14", "i13", "i12"]  # as they were ranked
        assert fold.random.seconds == fold.chosen.seconds == 6 * (8 + 4 * 8)


def test_the_dearer_list_is_cut_where_the_cost_is_nearest(stage: Stage) -> None:
    everyone = dict.fromkeys(map(name, range(16)), 30.0)
    folds = planned(stage, **{**everyone, "i15": 70.0, "i14": 20.0})
    assert [ids(fold.chosen.samples)[2:] for fold in folds] == [["i15", "i14", "i13"]] * 2
    assert [(fold.random.seconds, fold.chosen.seconds) for fold in folds] == [(180.0, 180.0)] * 2
    short = planned(stage, **{**everyone, **dict.fromkeys(map(name, CHOSEN), 18.0)})
    assert [(len(fold.random.samples), len(fold.chosen.samples)) for fold in short] == [(6, 8), (6, 8)]
    assert [(fold.random.seconds, fold.chosen.seconds) for fold in short] == [(180.0, 168.0)] * 2


def test_seconds_are_measured_for_all_or_modelled_for_all(stage: Stage) -> None:
    samples, prior = stage.frozen().holdout[:2], EffortConfig(image_s=10, add_s=5)
    first, second = ids(samples)
    both = {first: timed(first, 17.0), second: timed(second, 9000.0)}
    assert work_seconds(samples, both, prior) == ({first: 17.0, second: 90.0}, True)  # a break counts three times 30 s
    for broken in (None, 0.0, float("inf")):
        found = work_seconds(samples, {**both, second: timed(second, broken)}, prior)
        assert found == ({first: 30.0, second: 30.0}, False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"i00": {"state": "open"}}, "7 hold-out images are labelled, 8 are needed"),
        (every(CHOSEN, reason=FIRST_REASON), "0 labelled images were chosen by the strategy"),
        (every(CHOSEN, role="open"), "0 labelled images were chosen by the strategy"),
        (every(CONTROL, group="one"), "too few groups"),
    ],
)
def test_too_little_is_a_reason(stage: Stage, changes: dict[str, dict[str, Any]], reason: str) -> None:
    stage.context.index.set_images(NAME, changes)
    assert reason in planned(stage)


def test_dear_images_leave_too_few_at_equal_cost_and_random_is_not_compared_with_itself(stage: Stage) -> None:
    everyone = dict.fromkeys(map(name, range(16)), 10.0)
    assert "at equal cost fewer than 3" in planned(stage, **{**everyone, **dict.fromkeys(map(name, CHOSEN), 99.0)})
    config = stage.context.config
    select = config.select.model_copy(update={"strategy": "random"})
    context = replace(stage.context, config=config.model_copy(update={"select": select}))
    assert "random itself" in plan(context, stage.frozen(), {})


def test_an_image_that_has_changed_is_left_out_and_named(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    frozen = stage.frozen()
    write_png(np.zeros((96, 96, 3), np.uint8), frozen.train[2].image.path)
    frozen.train[3].image.path.unlink()
    assert all(not {"i10", "i11"} & set(ids(fold.chosen.samples)) for fold in planned(stage))
    assert "i10 is left out of the estimate" in caplog.text
    assert "i11 is left out of the estimate" in caplog.text


def version(number: int) -> ModelVersion:
    return ModelVersion(f"celloop-{NAME}", number, f"run{number}", f"celloop-{NAME}-v{number}", {})


def predict(stage: Stage, model: ModelVersion, quality: float) -> None:
    """Stores predictions that find that share of each image's cells."""
    measures = dict.fromkeys(FROM_ONE_LOOK, 0.1)
    store = PredictionStore(stage.context.workspace.predictions_dir, model.label)
    for row in stage.context.index.images(NAME):
        cells = stage.truth[row.image_id]
        kept = cells.take(range(round(quality * len(cells))))
        store.save(image_ref(row), StoredPrediction(kept, 0.1, np.zeros(2, np.float32), measures))


def made(stage: Stage, number: int, champion: ModelVersion | None, learnt: ModelVersion | None = None) -> Any:
    """The document of a round, kept in the index as a round keeps it."""
    index = stage.context.index
    if number > 0:
        index.update_round(NAME, number - 1, status="done")
    assert index.open_round(NAME).number == number
    index.update_round(NAME, number, champion_before="" if number == 0 else version(number).label)
    document = estimate.estimate(stage.context, number, stage.frozen(), champion, learnt=learnt)
    index.update_round(NAME, number, metrics={"ap": 0.5, "estimate": document})
    return document


def test_the_document_of_a_first_round_and_the_same_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    predict(stage, version(1), 0.5)
    trained: list[list[str]] = []
    real = against_random.train

    def train(samples: Any, *given: Any, **named: Any) -> Any:
        trained.append(ids(samples))
        return real(samples, *given, **named)

    monkeypatch.setattr(against_random, "train", train)
    document = made(stage, 0, version(1), version(1))
    assert (document["images"], document["teaching"], document["cells"], document["modelled"]) == (8, 8, 64, True)
    assert document["minutes"] == pytest.approx(16 * (8 + 4 * 8) / 60)
    assert document["live"]["ap"] == pytest.approx(0.5, abs=0.02)
    assert document["live"]["low"] <= document["live"]["ap"] <= document["live"]["high"]
    assert document["live"] == document["learnt"]
    assert document["agreement"] is None
    gain = document["gain"]
    assert gain["low"] <= gain["mean"] <= gain["high"]
    assert (gain["images"], gain["steps"], gain["round"], len(gain["folds"])) == (8, 2, 0, 2)  # half of 4 steps
    assert "three different amounts" in document["forecast"]["reason"]
    assert document["advice"]["kind"] == "too early"
    assert len(trained) == 4
    assert json.loads(json.dumps(document)) == document
    again = estimate.estimate(stage.context, 0, stage.frozen(), version(1), learnt=version(1))
    assert again == document
    assert len(trained) == 4


def test_killed_after_a_model_it_goes_on_after_it_and_says_the_same(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = stage.frozen()
    whole = against_random.against_random(stage.context, frozen, {})
    folder = stage.context.workspace.root / "estimates"
    (file,) = folder.rglob("*.json")
    file.unlink()
    real, runs = against_random._run, []

    def run(*given: Any) -> Any:
        if len(runs) == 3:
            raise KeyboardInterrupt
        runs.append(given)
        return real(*given)

    monkeypatch.setattr(against_random, "_run", run)
    with pytest.raises(KeyboardInterrupt):
        against_random.against_random(stage.context, frozen, {})
    monkeypatch.setattr(against_random, "_run", real)
    told: list[tuple[int, int]] = []
    assert against_random.against_random(stage.context, frozen, {}, lambda *at: told.append(at)) == whole
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert [given[3] for given in runs] == [None, 2, 2]  # the first model sets the steps of all


def steady(monkeypatch: pytest.MonkeyPatch, found: Any) -> list[int]:
    """No trainings: the comparison gives `found`, or raises it."""
    asked: list[int] = []

    def compare(*given: Any) -> Any:
        asked.append(1)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(estimate, "against_random", compare)
    return asked


def test_it_is_made_every_so_many_rounds_and_carried_on_between(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, quality in ((1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)):
        predict(stage, version(number), quality)
    asked = steady(monkeypatch, {"mean": 0.1, "low": 0.02, "high": 0.2, "images": 8})
    documents = []
    for number in range(4):
        if number > 0:
            stage.label(name(15 + number))
            stage.context.index.set_images(NAME, {name(15 + number): {"role": "train"}})
        documents.append(made(stage, number, version(1), version(number + 1)))
    assert [document["gain"]["round"] for document in documents] == [0, 0, 0, 3]
    assert len(asked) == 2
    agreed = [document["agreement"]["f1"] for document in documents[1:]]
    assert agreed == pytest.approx([2 / 3, 4 / 5, 6 / 7])  # 1 and 2 of 4 cells, 2 and 3, 3 and 4
    ahead = documents[3]["forecast"]
    assert ahead["low"] <= ahead["mean"] <= ahead["high"]
    assert (ahead["points"], ahead["images"]) == (4, 50)
    assert documents[3]["advice"]["kind"] == "go on"
    assert "pays" in documents[3]["advice"]["text"]


def test_successive_models_are_compared_on_open_images(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch, {"reason": "no"})
    for number, quality in ((1, 1.0), (2, 0.5)):
        predict(stage, version(number), quality)
    made(stage, 0, version(1), version(1))
    document = made(stage, 1, version(1), version(2))
    assert document["agreement"] == {"f1": pytest.approx(2 / 3), "images": 4}


def test_a_model_that_cannot_look_at_an_open_image_is_not_compared(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    predict(stage, version(1), 1.0)
    made(stage, 0, None)

    def broken(*given: Any, **named: Any) -> Any:
        raise NonFiniteError("the network gives NaN in image i17")

    monkeypatch.setattr(estimate, "predict_images", broken)
    steady(monkeypatch, {"reason": "no"})
    stage.context.index.update_round(NAME, 0, champion_before=version(1).label)
    assert estimate._agreement(stage.context, 0, version(2)) is None
    assert "v2 is not compared with celloop-cells-v1: the network gives NaN in image i17" in caplog.text


def test_an_error_in_the_comparison_is_a_reason_and_a_service_that_is_down_is_not(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steady(monkeypatch, ImageError("i03 cannot be read"))
    document = made(stage, 0, None)
    assert document["live"] is document["learnt"] is None
    assert document["gain"] == {"reason": "the models could not be compared: i03 cannot be read"}
    assert "i03 cannot be read" in document["advice"]["text"]
    assert "no models of random images in round 0" in caplog.text
    steady(monkeypatch, ServiceError("MLflow is down"))
    with pytest.raises(ServiceError):
        estimate.estimate(stage.context, 0, stage.frozen(), None)


def test_switched_off(stage: Stage) -> None:
    config = stage.context.config
    off = config.model_copy(update={"estimate": config.estimate.model_copy(update={"every": 0})})
    stage = replace(stage, context=replace(stage.context, config=off))
    assert "switched off" in made(stage, 0, None)["gain"]["reason"]
    assert interval_of(None) is interval_of({"reason": "no"}) is None


def test_nothing_labelled_to_measure_on(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, n=2, **QUICK)
    stage.label("i00")
    document = made(stage, 0, version(1))
    assert (document["live"], document["images"], document["advice"]["kind"]) == (None, 0, "too early")


def test_what_was_measured_of_a_strategy_says_nothing_once_images_are_drawn_at_random(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady(monkeypatch, {"mean": -0.1, "low": -0.2, "high": -0.02, "images": 8})
    assert made(stage, 0, None)["gain"]["mean"] == -0.1
    monkeypatch.undo()
    select = stage.context.config.select.model_copy(update={"strategy": "random"})
    config = stage.context.config.model_copy(update={"select": select})
    stage = replace(stage, context=replace(stage.context, config=config))
    document = made(stage, 1, None)
    assert "random itself" in document["gain"]["reason"]
    assert document["advice"]["kind"] != "use random"


def test_the_same_model_met_in_several_rounds_counts_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    steady(monkeypatch, {"reason": "no"})
    for number in (1, 2):
        predict(stage, version(number), 1.0)
    figures: list[Any] = []
    monkeypatch.setattr(estimate, "advise", lambda found: figures.append(found) or advise(found))
    index = stage.context.index
    for number in range(4):
        assert index.open_round(NAME).number == number
        index.update_round(NAME, number, champion_before=version(1).label)
        document = estimate.estimate(stage.context, number, stage.frozen(), version(1), learnt=version(2))
        assert document["agreement"]["f1"] == 1.0
        index.update_round(NAME, number, status="done", metrics={"estimate": document})
    assert [found.stable for found in figures] == [False] * 4  # one model that agrees is not three of them


def test_a_round_that_is_resumed_behind_its_gate_keeps_the_champion_of_before(stage: Stage) -> None:
    index, frozen = stage.context.index, stage.frozen()
    stage.registry.current = version(1)
    number = index.open_round(NAME).number
    _begun(stage.context, number, frozen)
    stage.registry.current = version(2)  # promoted, and then it was killed
    _begun(stage.context, number, frozen)
    assert index.rounds(NAME)[-1].champion_before == version(1).label
    stage.label("i16")
    _begun(stage.context, number, stage.frozen())
    assert index.rounds(NAME)[-1].champion_before == version(2).label
