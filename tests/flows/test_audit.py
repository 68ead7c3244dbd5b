"""What people say of pseudo-labels afterwards: counted by hand, and the negative controls."""

from pathlib import Path

import numpy as np
import pytest
from pseudo_stage import NAME, SIDE, Stage, make_stage, of_next_image, shifted

from flows.audit import audit, figures, proposal_store, standing, standings
from flows.context import image_ref
from loop.adapters.index import AuditRow
from loop.config import PseudoConfig
from loop.data.proposals import StoredProposal, Use
from loop.types import Instances, Sample

CONFIG = PseudoConfig(audit_cells=20, min_precision=0.6)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return make_stage(tmp_path, n=8, **{"pseudo.audit_cells": 20})


def used(cells: Instances, confidence: list[float] | None = None, number: int = 1) -> StoredProposal:
    sure = np.full(len(cells), 0.9, np.float32) if confidence is None else np.array(confidence, np.float32)
    return StoredProposal(cells, np.ones(len(cells), np.float32), Use(number, sure, keep=0.7))


def keep(stage: Stage, labeller: str, version: str, **proposals: StoredProposal) -> None:
    store = proposal_store(stage.context, labeller, version)
    for image_id, proposal in proposals.items():
        store.save(image_ref(stage.context.index.image(NAME, image_id)), proposal)


def teach_all(stage: Stage, labeller: str, err: object, ids: list[str] | None = None, number: int = 1) -> None:
    names = ids or sorted(stage.truth)
    keep(stage, labeller, f"{labeller}-v{number}", **{i: used(err(i), number=number) for i in names})  # type: ignore[operator]


def squares(*corners: tuple[int, int]) -> Instances:
    boxes = [(x, y, x + 10, y + 10) for x, y in corners]
    return Instances.build((SIDE, SIDE), boxes, [np.ones((10, 10), bool)] * len(corners))


def test_precision_and_recall_counted_by_hand(stage: Stage) -> None:
    stage.truth["i00"] = squares((0, 0), (20, 0), (40, 0))
    proposed = squares((0, 0), (60, 60), (23, 0), (40, 0))
    # The last of the four is doubtful. (0, 0) hits; (60, 60) is nothing; (23, 0) shares 70 of 130 px with (20, 0).
    keep(stage, "sam", "sam-v1", i00=used(proposed, [0.9, 0.8, 0.7, 0.5]))
    stage.label("i00")
    (row,) = audit(stage.context, 2, stage.frozen().train)
    assert (row.labeller, row.version, row.cells, row.hits, row.truths) == ("sam", "sam-v1", 3, 2, 3)
    assert row.precision == pytest.approx(2 / 3)
    assert row.recall == pytest.approx(2 / 3)
    assert stage.context.index.audits(NAME) == [row]


def test_two_cells_on_one_true_cell_hit_once(stage: Stage) -> None:
    stage.truth["i00"] = squares((0, 0))
    keep(stage, "sam", "sam-v1", i00=used(squares((0, 0), (1, 0))))
    stage.label("i00")
    (row,) = audit(stage.context, 2, stage.frozen().train)
    assert (row.cells, row.hits, row.truths) == (2, 1, 1)


def test_an_image_counts_once_and_a_repeated_audit_is_the_same(stage: Stage) -> None:
    teach_all(stage, "sam", stage.truth.get)
    stage.label("i00", "i01")
    first = audit(stage.context, 2, stage.frozen().train)
    assert audit(stage.context, 2, stage.frozen().train) == first
    assert audit(stage.context, 3, stage.frozen().train) == []
    stage.label("i02")
    (later,) = audit(stage.context, 3, stage.frozen().train)
    assert later.image_ids == ["i02"]
    assert [row.number for row in stage.context.index.audits(NAME)] == [2, 3]


def test_proposals_that_nothing_was_made_of_and_images_that_nobody_labelled_are_not_audited(stage: Stage) -> None:
    cells = stage.truth["i00"]
    keep(stage, "sam", "sam-v1", i00=StoredProposal(cells, np.ones(len(cells), np.float32)))
    teach_all(stage, "sam", stage.truth.get, ["i01"])
    stage.label("i00")
    stage.label("i01", role="control")
    assert audit(stage.context, 2, stage.frozen().train) == []


def test_the_last_use_of_an_image_counts_whichever_version_made_it(stage: Stage) -> None:
    teach_all(stage, "champion", lambda i: squares((0, 0)), ["i00"], number=1)
    teach_all(stage, "champion", stage.truth.get, ["i00"], number=2)
    stage.label("i00")
    (row,) = audit(stage.context, 3, stage.frozen().train)
    assert (row.version, row.precision) == ("champion-v2", 1.0)


def test_where_a_person_drew_only_a_part_the_rest_is_not_held_against_anybody(stage: Stage) -> None:
    stage.truth["i00"] = squares((0, 0))
    keep(stage, "sam", "sam-v1", i00=used(squares((0, 0), (60, 60))))
    stage.label("i00")
    (sample,) = stage.frozen().train
    known = np.zeros((SIDE, SIDE), bool)
    known[:40, :40] = True
    (row,) = audit(stage.context, 2, [Sample(sample.image, sample.instances, None, known)])
    assert (row.cells, row.hits) == (1, 1)


def test_pseudo_labels_shuffled_between_images_are_switched_off(stage: Stage) -> None:
    teach_all(stage, "champion", lambda i: of_next_image(stage, i))
    stage.label(*sorted(stage.truth))
    audit(stage.context, 2, stage.frozen().train)
    found = standings(stage.context, ["champion"])["champion"]
    assert (found.teaches, found.trust) == (False, 0.0)
    assert found.precision is not None
    assert found.precision < 0.3
    assert found.reason == (
        f"switched off by the audit: precision {found.precision:.2f} of {found.cells} cells, needed 0.6"
    )


def test_one_who_shifts_every_mask_by_ten_pixels_is_switched_off_and_the_honest_one_is_not(stage: Stage) -> None:
    teach_all(stage, "champion", stage.truth.get)
    teach_all(stage, "sam", lambda i: shifted(stage.truth[i]))
    stage.label(*sorted(stage.truth))
    audit(stage.context, 2, stage.frozen().train)
    found = standings(stage.context, ["champion", "sam"])
    assert found["champion"].teaches
    assert found["champion"].trust == 1.0
    assert not found["sam"].teaches
    values = figures(stage.context)
    assert values["audit.champion.precision"] == 1.0
    assert values["audit.sam.precision"] < 0.6
    assert values["audit.sam.cells"] == found["sam"].cells


def row(number: int, cells: int, hits: int) -> AuditRow:
    return AuditRow(1, number, "sam", "sam-v1", cells, hits, truths=cells)


def test_few_cells_decide_nothing_and_a_labeller_is_believed_before_any() -> None:
    assert standing([], CONFIG) == standing([], CONFIG)
    fresh, few = standing([], CONFIG), standing([row(1, 19, 0)], CONFIG)
    assert (fresh.teaches, fresh.trust, fresh.precision) == (True, 1.0, None)
    assert (few.teaches, few.trust, few.precision) == (True, 1.0, 0.0)
    assert "19 cells audited, fewer than 20" in few.reason


def test_audits_are_summed_back_until_there_are_enough_cells_and_a_labeller_recovers() -> None:
    bad, good = row(1, 100, 10), row(2, 15, 15)
    off = standing([bad], CONFIG)
    assert (off.teaches, off.trust) == (False, 0.0)
    assert not standing([bad, good], CONFIG).teaches  # 15 cells are too few to speak alone: 25 of 115
    back = standing([bad, good, row(3, 10, 7)], CONFIG)
    assert (back.teaches, back.cells) == (True, 25)
    assert back.trust == pytest.approx(22 / 25)


def test_the_threshold_itself_is_good_enough() -> None:
    assert standing([row(1, 50, 30)], CONFIG).teaches
    assert not standing([row(1, 50, 29)], CONFIG).teaches
