"""Labellers that cannot be built, that fail, flood or stay silent; what they have learnt from; and further kinds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pseudo_stage import NAME, SIDE, Guesser, Stage, hire, honest, make_stage

from flows import labellers
from flows.context import image_ref
from flows.gate import Decision
from flows.labellers import Panel, gather, learnt_from, propose, train_kinds
from flows.retrain import PLAIN, Lesson, _material, context_of_kind, keep_back, recipe_id
from loop.config import load_config
from loop.data.snapshot import write_snapshot
from loop.errors import CheckpointError, ConfigError, ServiceError
from loop.types import ImageRef, Instances, Sample


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    names = ("champion", "sam", "cellpose", "yolo")
    return make_stage(tmp_path, n=6, **{"pseudo.labellers": names, "pseudo.max_cells": 100})


def ref(stage: Stage, image_id: str) -> ImageRef:
    return image_ref(stage.context.index.image(NAME, image_id))


def flood(stage: Stage, image_id: str) -> Instances:
    """5,000 masks."""
    return Instances.build((SIDE, SIDE), [(0, 0, 4, 4)] * 5000, [np.ones((4, 4), bool)] * 5000)


def silence(stage: Stage, image_id: str) -> Instances:
    return Instances.build((SIDE, SIDE), image_id=image_id)


def test_one_that_throws_one_that_floods_and_one_that_sees_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(stage: Stage, image_id: str) -> Instances:
        if image_id == "i01":
            raise RuntimeError("the kernel died")
        return honest(stage, image_id)

    found = {"champion": honest, "sam": breaks, "cellpose": flood, "yolo": silence}
    hire(monkeypatch, **{name: Guesser(name, stage, err) for name, err in found.items()})
    crew = gather(stage.context, stage.learn())
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    first = propose(stage.context, crew, ref(stage, "i01"), pixels, None)
    second = propose(stage.context, crew, ref(stage, "i02"), pixels, None)
    assert set(first) == {"champion", "yolo"}
    assert set(second) == {"champion", "sam", "yolo"}
    assert len(first["yolo"].instances) == 0
    assert crew.skipped["sam"] == ["i01: the kernel died"]
    assert len(crew.skipped["cellpose"]) == 2
    assert "5000 cells, more than pseudo.max_cells=100" in crew.skipped["cellpose"][0]
    assert "labeller sam is left out for i01: the kernel died" in caplog.text


def test_what_was_proposed_is_not_asked_for_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    hire(monkeypatch, champion=Guesser("champion", stage, honest), sam=Guesser("sam", stage, honest, version="sam:b/1"))
    crew = gather(stage.context, stage.learn())
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    once = propose(stage.context, crew, ref(stage, "i00"), pixels, None)
    again = propose(stage.context, crew, ref(stage, "i00"), pixels, None)
    assert stage.asked == [("champion", "i00"), ("sam", "i00")]
    # What the champion's cells prompted is the champion's work too.
    assert {found["sam"].instances.model_version for found in (once, again)} == {"sam:b/1@celloop-cells-v1"}
    np.testing.assert_array_equal(once["sam"].stability, again["sam"].stability)
    np.testing.assert_array_equal(once["sam"].instances.boxes_xyxy, again["sam"].instances.boxes_xyxy)


def test_one_that_cannot_be_built_is_named_and_left_out(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hire(
        monkeypatch,
        champion=Guesser("champion", stage, honest),
        sam=CheckpointError("there is no sam_vit_b.pth in models"),
        cellpose=ModuleNotFoundError("No module named 'cellpose'"),
    )
    crew = gather(stage.context, stage.learn())
    assert crew.names == ("champion",)
    assert crew.missing["sam"] == "there is no sam_vit_b.pth in models"
    assert crew.missing["cellpose"] == "No module named 'cellpose'"
    assert "unknown labeller yolo" in crew.missing["yolo"]
    assert "labeller sam of cells is left out: there is no sam_vit_b.pth" in caplog.text


def test_a_service_that_is_away_is_no_matter_of_one_labeller(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    hire(monkeypatch, champion=ServiceError("MLflow does not answer"))
    with pytest.raises(ServiceError):
        gather(stage.context, stage.learn())


def test_the_champion_is_not_asked_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make_stage(tmp_path, n=2, **{"pseudo.labellers": ("champion", "seu_net")})
    hire(monkeypatch, champion=Guesser("champion", stage, honest), seu_net=Guesser("seu_net", stage, honest))
    crew = gather(stage.context, stage.learn())
    assert crew.names == ("champion",)
    assert "the champion itself" in crew.missing["seu_net"]


def looked(stage: Stage, **settings: Any) -> None:
    context = replace(stage.context, config=load_config(None, {"pseudo.labellers": ("champion", "sam"), **settings}))
    champion = stage.registry.current
    assert champion is not None
    assert Panel(context, champion).see(ref(stage, "i00"), None) is not None


def test_another_champion_prompts_anew_and_so_do_other_settings(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    hire(monkeypatch, champion=Guesser("champion", stage, honest), sam=Guesser("sam", stage, honest, needs_hint=True))
    stage.learn()
    looked(stage)
    looked(stage)
    assert stage.asked == [("champion", "i00"), ("sam", "i00")]
    stage.learn()
    looked(stage)
    assert stage.asked[2:] == [("sam", "i00")]
    looked(stage, **{"pseudo.views": 8})
    assert stage.asked[3:] == [("champion", "i00")]
    looked(stage, **{"pseudo.sam": {"mode": "both"}})
    assert stage.asked[4:] == [("sam", "i00")]


@pytest.mark.parametrize(("mode", "learnt"), [("both", {"i00"}), ("automatic", set())])
def test_who_may_be_prompted_has_learnt_what_the_champion_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, learnt: set[str]
) -> None:
    stage = make_stage(tmp_path, n=2, **{"pseudo.labellers": ("sam",), "pseudo.sam": {"mode": mode}})
    stage.label("i00")
    hire(monkeypatch, sam=Guesser("sam", stage, honest))
    assert Panel(stage.context, stage.learn()).learnt == learnt


def test_who_has_learnt_from_what(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.label("i00", "i01")
    champion = stage.learn()
    stage.label("i02")
    prompted, blind = Guesser("sam", stage, honest, needs_hint=True), Guesser("cellpose", stage, honest)
    hire(monkeypatch, champion=Guesser("champion", stage, honest), sam=prompted, cellpose=blind)
    panel = Panel(stage.context, champion)
    assert panel.crew.learnt == {"champion": {"i00", "i01"}, "sam": {"i00", "i01"}, "cellpose": frozenset()}
    assert panel.learnt == {"i00", "i01"}


def test_images_known_by_pseudo_labels_only_and_those_kept_back_are_not_learnt_from(stage: Stage) -> None:
    stage.label("i00", "i01", "i02")
    stage.label("i04", role="control")
    frozen = stage.frozen()
    guessed = Sample(replace(ref(stage, "i03"), split="pseudo"), replace(stage.truth["i03"], source="pseudo"))
    mixed = write_snapshot(stage.context.workspace.snapshots_dir, [*frozen.snapshot.samples, guessed], {}, NAME)
    assert learnt_from(stage.context, stage.registry.add(snapshot_id=mixed.id)) == {"i00", "i01", "i02"}
    _, kept = keep_back(frozen.train, 0.4)
    version = stage.registry.add(snapshot_id=mixed.id, validation="0.4")
    assert learnt_from(stage.context, version) == {"i00", "i01", "i02"} - {kept[0].image.image_id}


def test_what_vanished_before_the_training_does_not_move_who_was_kept_back(tmp_path: Path) -> None:
    stage = make_stage(tmp_path, n=20, **{"retrain.validation": 0.1})
    stage.label(*stage.truth)
    frozen = stage.frozen()
    _, kept = keep_back(frozen.train, 0.1)
    assert len(kept) == 2
    for sample in [sample for sample in frozen.train if sample not in kept][:10]:
        sample.image.path.unlink()
    material = _material(stage.context, frozen.snapshot.id, PLAIN)
    taught = {sample.image.image_id for sample in material.taught}
    assert (len(taught), len(material.kept_back), material.n_left_out) == (8, 2, 10)
    version = stage.registry.add(snapshot_id=frozen.snapshot.id, validation="0.1")
    assert taught <= learnt_from(stage.context, version)


def test_a_model_of_unknown_teaching_has_learnt_from_everything(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.label("i00", "i05")
    assert learnt_from(stage.context, stage.registry.add(snapshot_id="0" * 16)) == {"i00", "i05"}
    assert learnt_from(stage.context, stage.registry.add()) == {"i00", "i05"}
    assert "is not known" in caplog.text


def test_a_further_kind_has_its_own_model_and_budget(tmp_path: Path) -> None:
    settings = {"train.minutes": 4.0, "train.max_steps": 80, "pseudo.labeller_minutes": 1.0}
    stage = make_stage(tmp_path, n=1, **settings)
    kind = context_of_kind(stage.context, "pix2pix")
    assert kind.registry.model == "celloop-cells.pix2pix"
    assert kind.config.model.name == "pix2pix"
    assert kind.config.model.heads == ("interior", "border", "distance")
    assert (kind.config.train.minutes, kind.config.train.max_steps) == (1.0, 20)
    assert context_of_kind(stage.context, "unet").config.model.heads == stage.context.config.model.heads
    assert recipe_id(kind.config) != recipe_id(stage.context.config)


def test_kinds_are_trained_and_gated_and_one_that_fails_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("champion", "seu_net", "unet", "pix2pix", "sam")
    stage = make_stage(tmp_path, n=2, **{"pseudo.labellers": names})
    asked: list[tuple[str, Any]] = []

    def trains(context: Any, snapshot_id: str, log: Any, lesson: Lesson) -> Any:
        if lesson.kind == "pix2pix":
            raise ConfigError("the head distance has no target")
        asked.append((snapshot_id, lesson))
        return "version"

    def gates(context: Any, version: Any, holdout: Any) -> Decision:
        assert context.registry.model == "celloop-cells.unet"
        return Decision("first", "it is the first model of the project")

    monkeypatch.setattr(labellers, "challenger", trains)
    monkeypatch.setattr(labellers, "gate", gates)
    told = train_kinds(stage.context, "0" * 16, [])
    assert asked == [("0" * 16, Lesson(kind="unet"))]
    assert told == {
        "unet": "it is the first model of the project",
        "pix2pix": "not trained: the head distance has no target",
    }


def test_a_kind_without_a_model_joins_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make_stage(tmp_path, n=2, **{"pseudo.labellers": ("unet",)})
    monkeypatch.setattr(labellers, "load_segmenter", lambda context, version: version)
    monkeypatch.setattr(labellers, "build_labeller", lambda name, tools: tools.segmenter(name))
    crew = gather(stage.context, stage.learn())
    assert crew.missing == {"unet": "the project has no unet model yet; the next round that learns trains one"}
