"""Regions of the nucleus label become nuclei of a sample, all others its cells."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flows.freeze import freeze, split_nuclei
from flows.local.workspace import Workspace
from loop.adapters.index import AnnotationRow, ImageRow, Index
from loop.config import load_config
from loop.data.snapshot import load_snapshot
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.results import to_results
from loop.masks import from_masks, to_dense
from loop.types import Instances

SHAPE = (20, 24)


def square(y: int, x: int, side: int) -> Any:
    mask = np.zeros(SHAPE, bool)
    mask[y : y + side, x : x + side] = True
    return mask


CELL, OTHER, NUCLEUS = square(2, 2, 10), square(9, 12, 8), square(4, 4, 4)
DRAWN: dict[str, tuple[list[Any], str]] = {
    "both": ([CELL, NUCLEUS, OTHER], "CNC"),
    "cells": ([CELL, OTHER], "CC"),
    "empty": ([], ""),
    "nuclei": ([NUCLEUS], "N"),
}


@contextmanager
def labelled(
    root: Path, labels: tuple[str, ...], cell: str, nucleus: str, settings: dict[str, Any] | None = None
) -> Iterator[Any]:
    """A project with an image for each entry of DRAWN, labelled so."""
    index = Index(f"sqlite:///{root / 'index.sqlite3'}")
    xml = label_config(labels)
    interface = Interface.parse(xml)
    project = index.add_project("p", ls_project_id=1, root=root, label_config=xml)
    images, annotations = [], []
    for number, (name, (masks, kinds)) in enumerate(DRAWN.items(), start=1):
        drawn = [labels.index({"C": cell, "N": nucleus}[kind]) for kind in kinds]
        regions = to_results(from_masks(masks, SHAPE, labels=drawn, image_id=name), interface, tolerance_px=0)
        file = root / f"{name}.json"
        file.write_text(json.dumps({"result": regions}))
        now = datetime(2026, 1, 1, tzinfo=UTC)
        annotations.append(AnnotationRow(project.id, number, name, task_id=number, updated_at=now, file=str(file)))
        images.append(ImageRow(project.id, name, "0" * 64, str(root / name), "", number, "", height=20, width=24))
    index.add_images("p", images)
    index.put_annotations("p", annotations)
    index.set_images("p", {name: {"state": "labelled"} for name in DRAWN})
    config = load_config(None, settings)
    yield SimpleNamespace(index=index, interface=interface, workspace=Workspace(root), project_name="p", config=config)
    index.close()


def check(found: Instances | None, masks: list[Any]) -> None:
    assert found is not None
    np.testing.assert_array_equal(to_dense(found), np.reshape(masks, (-1, *SHAPE)))


@pytest.mark.parametrize("labels", [("Cell", "Nucleus"), ("Cell", "Debris", "Nucleus")])
def test_nuclei_are_no_cells_and_an_image_without_any_has_none(tmp_path: Path, labels: tuple[str, ...]) -> None:
    with labelled(tmp_path, labels, "Cell", "Nucleus") as context:
        frozen = freeze(context)
    assert frozen.left_out == ()
    loaded = load_snapshot(Workspace(tmp_path).snapshots_dir, frozen.snapshot.id)
    for snapshot in (frozen.snapshot, loaded):
        both, cells, empty, nuclei = snapshot.samples
        check(both.instances, [CELL, OTHER])
        check(both.nuclei, [NUCLEUS])
        check(cells.instances, [CELL, OTHER])
        check(cells.nuclei, [])
        check(nuclei.instances, [])
        check(nuclei.nuclei, [NUCLEUS])
        check(empty.instances, [])
        check(empty.nuclei, [])
        assert set(both.instances.labels.tolist()) == {labels.index("Cell")}
    assert sorted(line.split(":")[0] for line in frozen.suspicious) == ["empty", "nuclei"]


@pytest.mark.parametrize(
    ("labels", "settings"),
    [(("Cell",), {}), (("Cell", "Debris"), {}), (("Cell", "Nucleus"), {"publish.nucleus_label": "Kernel"})],
)
def test_a_project_without_that_label_has_no_nuclei(
    tmp_path: Path, labels: tuple[str, ...], settings: dict[str, Any]
) -> None:
    with labelled(tmp_path, labels, labels[0], labels[-1], settings) as context:
        samples = {sample.image.image_id: sample for sample in freeze(context).snapshot.samples}
    assert [sample.nuclei for sample in samples.values()] == [None] * 4
    check(samples["both"].instances, [CELL, NUCLEUS, OTHER])


def test_nuclei_that_are_the_only_label_are_the_cells() -> None:
    interface = Interface.parse(label_config(("Nucleus",)))
    drawn = from_masks([NUCLEUS], SHAPE)
    assert split_nuclei(drawn, interface, "Nucleus") == (drawn, None)


def test_nuclei_that_stand_first_are_what_is_segmented_also_beside_other_labels() -> None:
    interface = Interface.parse(label_config(("Nucleus", "Debris")))
    drawn = Instances.build((4, 4), [(0, 0, 2, 2)], [np.ones((2, 2), bool)])
    assert split_nuclei(drawn, interface, "Nucleus") == (drawn, None)
