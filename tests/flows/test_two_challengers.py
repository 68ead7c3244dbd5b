"""Two challengers, with and without pseudo-labels: how they are trained, which meets the champion, what is shown."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pseudo_stage import NAME, Stage, Versions, make_stage

import flows.gate
from flows import retrain
from flows.context import image_ref
from flows.gate import gate
from flows.pseudo import settings_id
from flows.retrain import PLAIN, Lesson, challenger, recipe_id, shortened
from flows.round import _lessons, _untrained
from loop.adapters.index import AuditRow, RoundRow
from loop.adapters.mlflow_registry import ModelVersion
from loop.config import LoopConfig, load_config
from loop.data.predictions import StoredPrediction
from loop.data.snapshot import write_snapshot
from loop.data.synthetic import draw_cells
from loop.types import ImageRef, Sample


def hold_out(n: int = 6) -> list[Sample]:
    samples = []
    for seed in range(n):
        _, cells = draw_cells(np.random.default_rng(seed), (48, 48), 4)
        image = ImageRef(f"h{seed}", Path(f"h{seed}.png"), "0" * 64, 48, 48, 3, split="holdout")
        samples.append(Sample(image, replace(cells, image_id=image.image_id)))
    return samples


class Court(Versions):
    """Notes what was decided of each version."""

    def __init__(self, champion: ModelVersion | None) -> None:
        super().__init__()
        self.current = champion
        self.told: dict[str, tuple[str, str, dict[str, float]]] = {}

    def promote(self, version: ModelVersion, reason: str, metrics: dict[str, float]) -> None:
        self.told[version.label] = ("promoted", reason, metrics)
        self.current = self.now(version.version)

    def refuse(self, version: ModelVersion, reason: str, metrics: dict[str, float]) -> None:
        self.told[version.label] = ("refused", reason, metrics)

    def now(self, number: int) -> ModelVersion:
        """A version as the registry would give it back."""
        decision, reason, metrics = self.told[f"m-v{number}"]
        tags = {"celloop.decision": decision, "celloop.reason": reason, "celloop.metrics": json.dumps(metrics)}
        return version(number, **tags)


def version(number: int, **tags: str) -> ModelVersion:
    return ModelVersion("m", number, f"run{number}", f"m-v{number}", tags)


def court(monkeypatch: pytest.MonkeyPatch, champion: ModelVersion | None, quality: dict[int, float]) -> Any:
    """A gate whose model number v finds the share quality[v] of each image's cells."""

    def predicted(
        context: Any, model: ModelVersion, images: list[ImageRef], *, again: bool = True
    ) -> dict[str, StoredPrediction]:
        found = {}
        for sample in hold_out():
            keep = range(round(quality[model.version] * len(sample.instances)))
            kept = sample.instances.take(list(keep))
            found[sample.image.image_id] = StoredPrediction(kept, 0.1, np.zeros(2, np.float32))
        return found

    monkeypatch.setattr(flows.gate, "predict_images", predicted)
    return SimpleNamespace(registry=Court(champion), config=LoopConfig(), project_name=NAME)


def test_the_better_of_the_two_meets_the_champion(monkeypatch: pytest.MonkeyPatch) -> None:
    context = court(monkeypatch, version(1), {1: 0.25, 2: 0.5, 3: 1.0})
    decision = gate(context, version(2), hold_out(), version(3))
    assert decision.outcome == "promoted"
    assert decision.metrics["mixed_ap"] == decision.metrics["ap"] == pytest.approx(1.0)
    assert decision.metrics["labelled_ap"] == pytest.approx(0.5, abs=0.02)
    assert decision.metrics["pseudo_gain"] == pytest.approx(0.5, abs=0.02)
    assert decision.metrics["pseudo_low"] <= decision.metrics["pseudo_gain"] <= decision.metrics["pseudo_high"]
    assert "pseudo-labels helped: AP 1.000 with them, 0.5" in decision.reason
    told = context.registry.told
    assert told["m-v3"][0] == "promoted"
    assert told["m-v2"][0] == "refused"
    assert told["m-v2"][1].startswith("m-v3 met the champion: pseudo-labels helped")
    assert told["m-v3"][2]["labelled_ap"] == decision.metrics["labelled_ap"]


def test_pseudo_labels_can_never_make_the_champion_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    context = court(monkeypatch, version(1), {1: 0.5, 2: 1.0, 3: 0.25})
    decision = gate(context, version(2), hold_out(), version(3))
    assert (decision.outcome, context.registry.champion().label) == ("promoted", "m-v2")
    assert "pseudo-labels did harm" in decision.reason
    assert decision.metrics["pseudo_gain"] < 0
    context = court(monkeypatch, version(1), {1: 1.0, 2: 0.25, 3: 0.5})
    decision = gate(context, version(2), hold_out(), version(3))
    assert (decision.outcome, context.registry.champion().label) == ("refused", "m-v1")
    assert {told[0] for told in context.registry.told.values()} == {"refused"}


def test_at_equal_ap_the_one_without_pseudo_labels_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    context = court(monkeypatch, None, {2: 0.5, 3: 0.5})
    decision = gate(context, version(2), hold_out(), version(3))
    assert (decision.outcome, context.registry.champion().label) == ("first", "m-v2")


def test_asked_again_it_decides_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    context = court(monkeypatch, version(1), {1: 0.25, 2: 0.5, 3: 1.0})
    first = gate(context, version(2), hold_out(), version(3))
    again = gate(context, context.registry.now(2), hold_out(), context.registry.now(3))
    assert (again.outcome, again.reason) == (first.outcome, first.reason)


def test_a_champion_that_learnt_the_same_labels_before_is_met_by_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of the pseudo-labels changed: people's labels give the champion again, both give a new model."""
    context = court(monkeypatch, version(1), {1: 0.25, 2: 0.5, 3: 1.0})
    gate(context, version(2), hold_out())
    decision = gate(context, context.registry.now(2), hold_out(), version(3))
    assert (decision.outcome, context.registry.champion().label) == ("promoted", "m-v3")
    assert decision.metrics["champion_ap"] == pytest.approx(0.5, abs=0.02)
    assert context.registry.told["m-v2"][0] == "promoted"


def test_a_champion_that_learnt_the_same_labels_stays_where_the_new_one_is_no_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = court(monkeypatch, version(1), {1: 0.25, 2: 1.0, 3: 0.5})
    gate(context, version(2), hold_out())
    first = gate(context, context.registry.now(2), hold_out(), version(3))
    assert (first.outcome, context.registry.champion().label) == ("refused", "m-v2")
    assert first.metrics["ap"] == pytest.approx(1.0)
    assert context.registry.told["m-v2"][0] == "promoted"
    assert gate(context, context.registry.now(2), hold_out(), context.registry.now(3)) == first


def test_less_training_for_the_one_without_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    context = court(monkeypatch, None, {2: 0.5, 3: 1.0})
    fair = gate(context, version(2), hold_out(), version(3))
    assert fair.metrics["labelled_share"] == 1.0
    assert "of the training" not in fair.reason
    context = court(monkeypatch, None, {2: 0.5, 3: 1.0})
    context.config = load_config(None, {"pseudo.labelled_only": 0.5})
    biased = gate(context, version(2), hold_out(), version(3))
    assert biased.metrics["labelled_share"] == 0.5
    assert "without (the one without had 50% of the training), mean gain" in biased.reason


def test_no_more_is_said_than_the_hold_out_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    context = court(monkeypatch, None, {2: 0.5, 3: 1.0})
    context.config = load_config(None, {"gate.min_images": 7})
    few = gate(context, version(2), hold_out(), version(3))
    assert "pseudo-labels are not shown to help: AP 1.000" in few.reason
    monkeypatch.setattr(flows.gate, "predict_images", lambda *given, **more: {})
    none = gate(court_of(context, version(1)), version(2), hold_out(), version(3))
    assert none.reason.endswith("whether pseudo-labels help cannot be said without a hold-out image")
    assert "mixed_ap" not in none.metrics


def court_of(context: Any, champion: ModelVersion) -> Any:
    context.registry = Court(champion)
    return context


def test_when_one_of_the_two_was_rolled_back_neither_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    context = court(monkeypatch, version(1), {1: 0.25, 2: 0.5, 3: 1.0})
    told = {"ap": 0.9, "mixed_ap": 0.9, "labelled_ap": 0.8}
    tags = {"celloop.decision": "rolled back", "celloop.reason": "worse on slide 7"}
    back = version(3, **tags, **{"celloop.metrics": json.dumps(told)})
    decision = gate(context, version(2), hold_out(), back)
    assert decision.outcome == "refused"
    assert "worse on slide 7" in decision.reason
    assert decision.metrics == {"ap": 0.9}  # this round has compared nothing
    assert context.registry.told == {}


def test_a_share_of_the_budget_and_what_the_recipe_says() -> None:
    config = load_config(None, {"train.minutes": 3.0, "train.max_steps": 50, "pseudo.keep": 0.7})
    half = shortened(config, 0.5)
    assert (half.train.minutes, half.train.max_steps) == (1.5, 25)
    assert shortened(config, 0.001).train.max_steps == 1
    assert shortened(config, 1.0) is config
    other = load_config(None, {"train.minutes": 3.0, "train.max_steps": 50, "pseudo.keep": 0.8})
    assert recipe_id(config) == recipe_id(other)
    assert recipe_id(config, Lesson("mixed")) != recipe_id(other, Lesson("mixed"))
    assert len({recipe_id(config, lesson) for lesson in (PLAIN, Lesson(share=0.5), Lesson("mixed"))}) == 3


def test_what_a_round_trains(tmp_path: Path) -> None:
    context = make_stage(tmp_path, n=1, **{"pseudo.labelled_only": 0.4}).context
    assert _lessons(context, "s", {}) == [("s", PLAIN)]
    assert _lessons(context, "s", {"mixed_snapshot": "m"}) == [("s", Lesson(share=0.4)), ("m", Lesson("mixed"))]


def test_nothing_is_trained_again_until_labels_or_settings_change(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, n=3)
    stage.label("i00", "i01")
    stage.label("i02", role="control")
    frozen, config = stage.frozen(), stage.context.config
    both = {"settings": settings_id(config), "mixed_snapshot": "m"}
    last = RoundRow(1, 2, status="done", pseudo=both)
    assert _untrained(stage.context, frozen, last)
    alone = Lesson(share=config.pseudo.labelled_only)
    stage.registry.add(snapshot_id=frozen.snapshot.id, recipe_id=recipe_id(config, alone))
    assert _untrained(stage.context, frozen, last)
    stage.registry.add(snapshot_id="m", recipe_id=recipe_id(config, Lesson("mixed")))
    assert not _untrained(stage.context, frozen, last)
    other = replace(stage.context, config=load_config(None, {"pseudo.keep": 0.9}))
    assert _untrained(other, frozen, last)
    assert _untrained(stage.context, frozen, RoundRow(1, 2, status="done"))  # of an index before pseudo-labels


class Run:
    """A run that notes its figures."""

    run_id = "run-1"

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *args: object) -> None:
        """Nothing is open."""

    def log(self, step: int, values: dict[str, float]) -> None:
        self.logged |= values

    def picture(self, name: str, image: Any) -> None:
        """Nobody looks."""


class Trainings(Versions):
    """Keeps what was trained with which tags."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Run] = []
        self.params: list[dict[str, Any]] = []

    def start_run(self, name: str, *, params: dict[str, Any], tags: dict[str, str]) -> Run:
        self.runs.append(Run())
        self.params.append(params)
        return self.runs[-1]

    def register(self, run_id: str, directory: Path, *, tags: dict[str, str]) -> ModelVersion:
        return self.add(**tags)


@pytest.fixture
def taught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Stage, list[dict[str, Any]]]:
    """Two labelled images and one pseudo-labelled; what the trainer is given is noted."""
    stage = make_stage(tmp_path, n=4, **{"train.max_steps": 10})
    stage = replace(stage, context=replace(stage.context, registry=Trainings()))  # type: ignore[arg-type]
    given: list[dict[str, Any]] = []

    def train(samples: Any, model: Any, config: Any, **rest: Any) -> Any:
        given.append({"samples": samples, "config": config, **rest})
        return SimpleNamespace(net=None, steps=1, seconds=1.0, instances=None)

    monkeypatch.setattr(retrain, "train", train)
    monkeypatch.setattr(retrain, "save_checkpoint", lambda *args, **rest: None)
    monkeypatch.setattr(retrain, "_examples", lambda *args: None)
    return stage, given


def test_the_mixed_challenger_learns_from_both_and_its_run_holds_the_audits(
    taught: tuple[Stage, list[dict[str, Any]]],
) -> None:
    stage, given = taught
    stage.label("i00", "i01")
    frozen = stage.frozen()
    row = stage.context.index.image(NAME, "i02")
    cells = replace(stage.truth["i02"], source="pseudo")
    guessed = Sample(replace(image_ref(row), split="pseudo"), cells)
    both = write_snapshot(stage.context.workspace.snapshots_dir, [*frozen.snapshot.samples, guessed], {}, NAME)
    stage.context.index.put_audits(NAME, [AuditRow(1, 1, "sam", "sam-v1", cells=40, hits=30, truths=60)])
    alone = challenger(stage.context, frozen.snapshot.id, None, Lesson(share=0.5))
    mixed = challenger(stage.context, both.id, None, Lesson("mixed"))
    assert (alone.tags["teaching"], mixed.tags["teaching"]) == ("labelled", "mixed")
    assert mixed.tags["snapshot_id"] == both.id
    assert "pseudo" not in given[0]
    assert [s.image.image_id for s in given[1]["pseudo"]] == ["i02"]
    assert [s.image.image_id for s in given[1]["samples"]] == ["i00", "i01"]
    assert [part["config"].max_steps for part in given] == [5, 10]
    registry: Any = stage.context.registry
    audited = {"audit.sam.precision": 0.75, "audit.sam.recall": 0.5, "audit.sam.cells": 40.0}
    assert [run.logged for run in registry.runs] == [audited, audited]
    assert (registry.params[0]["images_pseudo"], registry.params[1]["images_pseudo"]) == (0, 1)
    assert challenger(stage.context, both.id, None, Lesson("mixed")) == mixed
    assert len(given) == 2


def test_states_of_other_lineages_are_left_alone(taught: tuple[Stage, list[dict[str, Any]]]) -> None:
    stage, _ = taught
    folder = stage.context.workspace.training_dir / NAME
    for name in ("old-recipe", "mixed.old-recipe", "unet.old-recipe"):
        (folder / name).mkdir(parents=True)
    retrain._state_dir(stage.context, "new-recipe", "")
    assert sorted(path.name for path in folder.iterdir()) == ["mixed.old-recipe", "unet.old-recipe"]
    retrain._state_dir(stage.context, "mixed.new-recipe", "mixed.")
    assert sorted(path.name for path in folder.iterdir()) == ["unet.old-recipe"]
