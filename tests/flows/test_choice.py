"""What select, publish and gate decide, on a real index; the services behind them are not asked."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import flows.gate
import flows.select
import flows.texture
from flows.absent import absent_lines
from flows.gate import gate
from flows.local.workspace import Workspace
from flows.publish import _order
from flows.select import select
from loop.adapters.index import ImageRow, Index
from loop.adapters.mlflow_registry import ModelVersion
from loop.config import LoopConfig, load_config
from loop.data.predictions import StoredPrediction
from loop.data.store import describe, write_png
from loop.data.synthetic import draw_cells
from loop.errors import ConfigError, InputError
from loop.types import ImageRef, Instances, Sample, Selection

NAME = "cells"


def context_of(tmp_path: Path, groups: dict[str, str], **overrides: object) -> Any:
    tmp_path.mkdir(exist_ok=True)
    for image_id in groups:
        (tmp_path / f"{image_id}.png").touch()
    index = Index(f"sqlite:///{tmp_path / 'index.sqlite3'}")
    project = index.add_project(NAME, ls_project_id=1, root=tmp_path, label_config="")
    index.add_images(
        NAME,
        [
            ImageRow(project.id, image_id, "0" * 64, str(tmp_path / f"{image_id}.png"), "", number, group)
            for number, (image_id, group) in enumerate(groups.items(), start=1)
        ],
    )
    ways = {"select.strategy": "uncertain_diverse", "select.first_strategy": "random", "select.embedding": "model"}
    config: LoopConfig = load_config(None, {**ways, **overrides})
    return SimpleNamespace(index=index, project_name=NAME, config=config, workspace=Workspace(tmp_path / "ws"))


def prediction(uncertainty: float, seed: int = 0, cells: int = 0, **measures: float) -> StoredPrediction:
    embedding = np.random.default_rng(seed).random(4, dtype=np.float32)
    boxes, masks = [(0, 0, 2, 2)] * cells, [np.ones((2, 2), np.bool_)] * cells
    return StoredPrediction(Instances.build((8, 8), boxes, masks), uncertainty, embedding, measures)


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


def test_a_pool_that_is_used_up_by_skipping_and_setting_aside_is_a_state_too(tmp_path: Path) -> None:
    context = context_of(tmp_path, {"a": "", "b": "", "c": ""})
    context.index.set_images(NAME, {"a": {"state": "unusable"}, "b": {"state": "skipped"}, "c": {"state": "gone"}})
    assert select(context, 0, {}) == []
    assert select(context, 1, {name: prediction(0.2) for name in "abc"}) == []
    assert set(roles(context).values()) == {"open"}


@pytest.mark.parametrize("first", [True, False])
def test_unusable_and_vanished_images_are_never_chosen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: bool
) -> None:
    context = context_of(tmp_path, {f"i{n:02d}": "" for n in range(8)}, **{"select.batch": 8, "select.control": 0.5})
    context.index.set_images(NAME, {"i00": {"state": "unusable"}, "i02": {"role": "control", "rank": 1}})
    (tmp_path / "i01.png").unlink()
    (tmp_path / "i02.png").unlink()
    predictions = {} if first else {f"i{n:02d}": prediction(0.1 + n / 10, n) for n in range(8)}
    batch = select(context, 1, predictions)
    assert sorted(s.image_id for s in batch) == ["i03", "i04", "i05", "i06", "i07"]
    assert "2 open images are not in the choice, their files are gone: i01, i02" in caplog.text
    assert absent_lines(context, predictions)[0].startswith("i01, i02: the file is gone")


def test_images_without_a_prediction_are_named_and_not_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = context_of(tmp_path, {f"i{n:02d}": "" for n in range(20)}, **{"select.batch": 20})
    predictions = {f"i{n:02d}": prediction(0.5, n) for n in range(8)}
    batch = select(context, 1, predictions)
    assert sorted(s.image_id for s in batch) == sorted(predictions)
    assert "12 open images are not in the choice, without a prediction: i08, i09" in caplog.text
    (line,) = absent_lines(context, predictions)
    assert line.startswith("i08, i09, i10, i11, i12, i13, i14, i15, i16, i17 and 2 more: no prediction")
    assert absent_lines(context, {}) == ()


def test_images_without_the_measure_asked_for_are_named_unless_all_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"select.measure": "bald", "select.batch": 4}
    context = context_of(tmp_path, {"a": "", "b": "", "c": ""}, **settings)
    some = {"a": prediction(0.5, 1, bald=0.1), "b": prediction(0.5, 2, bald=0.2), "c": prediction(0.5, 3, entropy=0.4)}
    assert {s.image_id for s in select(context, 1, some)} == {"a", "b"}
    assert "without a prediction: c" in caplog.text
    with pytest.raises(InputError, match=r"no measure 'bald', only entropy.*select\.passes"):
        select(context, 2, {name: some["c"] for name in "abc"})


def test_the_quickest_come_first_and_their_seconds_are_kept(tmp_path: Path) -> None:
    settings = {"select.batch": 6, "select.control": 0.0, "select.quick_first": 2}
    context = context_of(tmp_path, {f"i{n}": "" for n in range(6)}, **settings)
    cells = {"i0": 9, "i1": 7, "i2": 1, "i3": 8, "i4": 3, "i5": 6}
    batch = select(context, 1, {i: prediction(0.9 - n / 10, n, cells[i]) for n, i in enumerate(cells)})
    assert [s.image_id for s in batch][:2] == ["i2", "i4"]
    assert [s.reason.endswith("quick, so it comes first") for s in batch] == [True, True] + [False] * 4
    rows = {row.image_id: row.seconds or 0.0 for row in context.index.images(NAME)}
    assert sorted(rows, key=rows.__getitem__) == sorted(cells, key=cells.__getitem__)
    assert min(rows.values()) > context.config.effort.image_s


def test_waiting_control_images_come_behind_the_quick_ones(tmp_path: Path) -> None:
    settings = {"select.batch": 6, "select.control": 0.2, "select.quick_first": 2}
    context = context_of(tmp_path, {f"i{n}": "" for n in range(9)}, **settings)
    context.index.set_images(NAME, {f"i{n}": {"role": "control", "chosen_in": 0, "rank": 1 + n} for n in (0, 1)})
    batch = select(context, 1, {f"i{n}": prediction(0.5, n, cells=n) for n in range(9)})
    assert [s.rank for s in batch if s.control] == [4, 6]
    assert [s.image_id for s in batch if s.control] == ["i0", "i1"]


def drawn_context(tmp_path: Path, dark: int, light: int, **overrides: object) -> Any:
    """Images of cells on dark and on light ground, on disk."""
    names = [f"dark{n}" for n in range(dark)] + [f"light{n}" for n in range(light)]
    context = context_of(tmp_path, dict.fromkeys(names, ""), **{"select.first_strategy": "typical", **overrides})
    rows = []
    for n, row in enumerate(context.index.images(NAME)):
        pixels, _ = draw_cells(np.random.default_rng(n), (48, 48), 4)
        write_png(pixels if row.image_id.startswith("dark") else 255 - pixels, Path(row.path))
        rows.append(replace(row, sha256=describe(Path(row.path)).sha256))
    context.index.add_images(NAME, rows)
    return context


def test_the_first_batch_goes_by_texture_and_reads_each_image_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"select.first_batch": 4, "select.first_control": 0.5}
    context = drawn_context(tmp_path, dark=2, light=14, **settings)
    read, real = [], flows.texture.read_image
    monkeypatch.setattr(flows.texture, "read_image", lambda path: read.append(path.stem) or real(path))
    told: list[tuple[int, int]] = []
    batch = select(context, 0, {}, lambda *at: told.append(at))
    assert told == [(done, 16) for done in range(1, 17)]
    assert sum(s.control for s in batch) == 2
    assert all("random" not in s.reason for s in batch if not s.control)
    assert sorted(read) == [row.image_id for row in context.index.images(NAME)]
    again = drawn_context(tmp_path / "again", dark=2, light=14, **settings)
    again.workspace = context.workspace
    assert select(again, 0, {}) == batch
    assert len(read) == 16


def test_a_first_batch_without_control_has_both_kinds(tmp_path: Path) -> None:
    context = drawn_context(tmp_path, dark=7, light=7, **{"select.first_batch": 2, "select.first_control": 0.001})
    assert {s.image_id[:4] for s in select(context, 0, {})} == {"dark", "ligh"}


def test_an_image_that_cannot_be_read_is_not_in_the_first_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = drawn_context(tmp_path, dark=2, light=4, **{"select.first_batch": 6})
    (tmp_path / "light1.png").write_bytes(b"no picture")
    assert len(select(context, 0, {})) == 5
    assert "light1 is not looked at" in caplog.text
    damaged = next((context.workspace.predictions_dir / "texture").glob("dark0-*"))
    damaged.write_bytes(b"half")
    context.index.set_images(NAME, {row.image_id: {"chosen_in": None} for row in context.index.images(NAME)})
    assert len(select(context, 0, {})) >= 5


def test_of_a_large_pool_a_random_part_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows.select, "MOST_DESCRIBED", 6)
    context = drawn_context(tmp_path, dark=4, light=8, **{"select.first_batch": 3})
    assert len(select(context, 0, {})) == 3
    assert len(list((context.workspace.predictions_dir / "texture").iterdir())) == 6


def test_later_batches_go_by_the_look_or_by_the_model_as_asked(tmp_path: Path) -> None:
    """The model finds dark3 unlike the rest; by eye it is the one light image."""
    for embedding, expected in (("look", "light0"), ("model", "dark3")):
        ways = {"select.strategy": "core_set", "select.embedding": embedding, "select.batch": 1, "select.control": 0.0}
        context = drawn_context(tmp_path / embedding, dark=5, light=1, **ways)
        label(context, "dark0", role="train", taught=True)
        names = [row.image_id for row in context.index.images(NAME)]
        found = {name: replace(prediction(0.2), embedding=np.zeros(4, np.float32)) for name in names}
        found["dark3"] = replace(prediction(0.2), embedding=np.ones(4, np.float32))
        assert [s.image_id for s in select(context, 1, found)] == [expected]


def test_an_unknown_first_strategy_is_refused(tmp_path: Path) -> None:
    context = drawn_context(tmp_path, dark=2, light=4, **{"select.first_strategy": "best"})
    with pytest.raises(ConfigError, match="strategy 'best' is unknown"):
        select(context, 0, {})


def test_order_is_batch_then_what_wants_a_word_then_uncertainty_then_what_cannot_be_used(tmp_path: Path) -> None:
    names = {"held": "G", "sibling": "G", "low": "", "high": "", "chosen": "", "done": "", "blind": "", "lost": ""}
    context = context_of(tmp_path, {**names, "second": ""})
    context.index.set_images(NAME, {"held": {"role": "control"}})
    label(context, "held", "done", "second")
    predictions = {name: prediction(u) for name, u in {"sibling": 0.6, "low": 0.1, "high": 0.5, "chosen": 0.05}.items()}
    images = context.index.images(NAME)
    second = [row for row in images if row.image_id == "second"]
    order = _order(images, [Selection("chosen", 1, False, "why")], predictions, second=second, gone={"lost"})
    assert [row.image_id for row in order] == ["chosen", "second", "blind", "high", "low", "sibling", "lost"]


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

    def predicted(context: Any, model: ModelVersion, images: list[ImageRef], **_: Any) -> dict[str, StoredPrediction]:
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
