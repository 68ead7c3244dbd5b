"""What select, publish and gate decide, on a real index; the services behind them are not asked."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import flows.gate
from flows.gate import gate
from flows.publish import _order
from flows.select import select
from loop.adapters.index import ImageRow, Index
from loop.adapters.mlflow_registry import ModelVersion
from loop.config import LoopConfig, load_config
from loop.data.predictions import StoredPrediction
from loop.data.synthetic import draw_cells
from loop.types import ImageRef, Instances, Sample, Selection

NAME = "cells"


def context_of(tmp_path: Path, groups: dict[str, str], **overrides: object) -> Any:
    index = Index(f"sqlite:///{tmp_path / 'index.sqlite3'}")
    project = index.add_project(NAME, ls_project_id=1, root=tmp_path, label_config="")
    index.add_images(
        NAME,
        [
            ImageRow(project.id, image_id, "0" * 64, f"{image_id}.png", "", task_id=number, group=group)
            for number, (image_id, group) in enumerate(groups.items(), start=1)
        ],
    )
    config: LoopConfig = load_config(None, overrides)
    return SimpleNamespace(index=index, project_name=NAME, config=config)


def prediction(uncertainty: float, seed: int = 0) -> StoredPrediction:
    embedding = np.random.default_rng(seed).random(4, dtype=np.float32)
    return StoredPrediction(Instances.build((8, 8)), uncertainty, embedding)


def label(context: Any, *image_ids: str, **fields: object) -> None:
    context.index.set_images(NAME, {image_id: {"state": "labelled", **fields} for image_id in image_ids})


def roles(context: Any) -> dict[str, str]:
    return {row.image_id: row.role for row in context.index.images(NAME)}


def test_the_first_batch_is_half_control_and_the_same_when_asked_again(tmp_path: Path) -> None:
    context = context_of(tmp_path, {f"i{n:02d}": "" for n in range(30)})
    batch = select(context, 0, {})
    assert len(batch) == 12
    assert sum(s.control for s in batch) == 6
    assert select(context, 0, {}) == batch


def test_rounds_without_a_model_do_not_grow_the_hold_out(tmp_path: Path) -> None:
    context = context_of(tmp_path, {f"i{n:02d}": "" for n in range(40)})
    first = select(context, 0, {})
    label(context, next(s.image_id for s in first if not s.control))
    for number in (1, 2, 3):
        again = select(context, number, {})
        assert {s.image_id for s in again if s.control} == {s.image_id for s in first if s.control}
    assert list(roles(context).values()).count("control") == 6


def test_an_image_that_taught_never_measures_even_without_its_annotation(tmp_path: Path) -> None:
    groups = {f"a{n}": "A" for n in range(6)} | {f"b{n}": "B" for n in range(6)}
    context = context_of(tmp_path, groups, **{"select.batch": 6, "select.control": 0.5})
    context.index.set_images(NAME, {"a0": {"taught": True}})
    batch = select(context, 1, {image_id: prediction(0.3, seed) for seed, image_id in enumerate(groups)})
    assert [s.image_id for s in batch if s.control]
    assert all(s.image_id.startswith("b") for s in batch if s.control)


def test_waiting_control_images_stay_and_other_open_ones_go_back(tmp_path: Path) -> None:
    context = context_of(tmp_path, {f"i{n:02d}": "" for n in range(20)}, **{"select.batch": 5, "select.control": 0.2})
    context.index.set_images(
        NAME,
        {
            "i00": {"role": "control", "chosen_in": 1, "rank": 1},
            "i01": {"role": "train", "chosen_in": 1, "rank": 2, "reason": "old"},
        },
    )
    batch = select(context, 2, {f"i{n:02d}": prediction(0.1 if n == 1 else 0.5, n) for n in range(20)})
    assert len(batch) == 5
    assert [s.image_id for s in batch if s.control] == ["i00"]
    if "i01" not in {s.image_id for s in batch}:
        row = context.index.image(NAME, "i01")
        assert (row.role, row.rank, row.reason) == ("open", None, "")


def test_an_exhausted_pool_is_a_state(tmp_path: Path) -> None:
    context = context_of(tmp_path, {"only": ""})
    label(context, "only")
    assert select(context, 1, {"only": prediction(0.2)}) == []


def test_order_is_batch_then_uncertainty_then_what_cannot_be_used(tmp_path: Path) -> None:
    context = context_of(tmp_path, {"held": "G", "sibling": "G", "low": "", "high": "", "chosen": "", "done": ""})
    context.index.set_images(NAME, {"held": {"role": "control"}})
    label(context, "held", "done")
    predictions = {name: prediction(u) for name, u in {"sibling": 0.6, "low": 0.1, "high": 0.5, "chosen": 0.05}.items()}
    order = _order(context.index.images(NAME), [Selection("chosen", 1, False, "why")], predictions)
    assert [row.image_id for row in order] == ["chosen", "high", "low", "sibling"]


@dataclass
class Versions:
    """Champion and decisions, as the registry keeps them."""

    current: ModelVersion | None = None
    decisions: list[tuple[str, str]] = field(default_factory=list)

    def champion(self) -> ModelVersion | None:
        return self.current

    def set_challenger(self, version: ModelVersion) -> None:
        self.decisions.append(("challenger", version.label))

    def promote(self, version: ModelVersion, reason: str, metrics: dict[str, float]) -> None:
        self.current = version
        self.decisions.append(("promoted", reason))

    def refuse(self, version: ModelVersion, reason: str, metrics: dict[str, float]) -> None:
        self.decisions.append(("refused", reason))


def version(number: int, **tags: str) -> ModelVersion:
    return ModelVersion("celloop-cells", number, f"run{number}", f"celloop-cells-v{number}", tags)


def hold_out(n: int) -> list[Sample]:
    samples = []
    for seed in range(n):
        _, cells = draw_cells(np.random.default_rng(seed), (48, 48), 3)
        image = ImageRef(f"h{seed}", Path(f"h{seed}.png"), "0" * 64, 48, 48, 3, split="holdout")
        samples.append(Sample(image, replace(cells, image_id=image.image_id)))
    return samples


def gate_of(
    monkeypatch: pytest.MonkeyPatch, champion: ModelVersion | None, quality: dict[int, float], n: int = 6
) -> Any:
    """A gate whose model number v finds the share quality[v] of each image's cells."""
    registry = Versions(champion)

    def predicted(context: Any, model: ModelVersion, images: list[ImageRef]) -> dict[str, StoredPrediction]:
        found = {}
        for sample in hold_out(n):
            cells = sample.instances
            keep = range(round(quality[model.version] * len(cells)))
            found[sample.image.image_id] = StoredPrediction(cells.take(list(keep)), 0.1, np.zeros(2, np.float32))
        return found

    monkeypatch.setattr(flows.gate, "predict_images", predicted)
    return SimpleNamespace(registry=registry, config=LoopConfig(), project_name=NAME)


def test_the_first_model_goes_into_service_with_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    context = gate_of(monkeypatch, None, {1: 1.0})
    decision = gate(context, version(1), hold_out(6))
    assert decision.outcome == "first"
    assert decision.metrics["ap"] == pytest.approx(1.0)
    assert context.registry.champion().version == 1


def test_a_better_model_is_promoted_and_a_worse_one_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    context = gate_of(monkeypatch, version(1), {1: 0.4, 2: 1.0})
    better = gate(context, version(2), hold_out(6))
    assert better.outcome == "promoted"
    assert better.metrics["champion_ap"] < better.metrics["ap"]
    context = gate_of(monkeypatch, version(1), {1: 1.0, 2: 0.4})
    worse = gate(context, version(2), hold_out(6))
    assert worse.outcome == "refused"
    assert "celloop-cells-v1 stays" in worse.reason
    assert context.registry.champion().version == 1


def test_an_equal_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    context = gate_of(monkeypatch, version(1), {1: 0.7, 2: 0.7})
    assert gate(context, version(2), hold_out(6)).outcome == "refused"


def test_a_small_hold_out_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    context = gate_of(monkeypatch, version(1), {1: 0.0, 2: 1.0}, n=2)
    decision = gate(context, version(2), hold_out(2))
    assert decision.outcome == "refused"
    assert "2 labelled images" in decision.reason


def test_an_image_that_one_model_cannot_predict_is_left_out_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    context = gate_of(monkeypatch, version(1), {1: 0.4, 2: 1.0}, n=6)
    decision = gate(context, version(2), hold_out(7))
    assert decision.metrics["n_images"] == 6


def test_a_model_that_was_rolled_back_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    context = gate_of(monkeypatch, version(1), {1: 0.4, 2: 1.0})
    back = version(2, **{"celloop.decision": "rolled back", "celloop.reason": "worse on slide 7"})
    decision = gate(context, back, hold_out(6))
    assert decision.outcome == "refused"
    assert "worse on slide 7" in decision.reason
    assert context.registry.champion().version == 1
