"""What of the labelled cells is remembered for clicks."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flows.typical import note_typical
from loop.adapters.index import Index
from loop.masks import from_masks
from loop.metrics.typical import Typical
from loop.types import ImageRef, Sample

SHAPE = (40, 40)


def sample(number, modality, radius, split="train", cells=1):
    rows, columns = np.ogrid[: SHAPE[0], : SHAPE[1]]
    mask = (rows - 20) ** 2 + (columns - 20) ** 2 <= radius**2
    image = ImageRef(f"i{number}", Path("x"), "0", *SHAPE, 1, split=split, modality=modality)
    return Sample(image, from_masks([mask] * cells, SHAPE))


@pytest.fixture
def context(tmp_path):
    index = Index(f"sqlite:///{tmp_path / 'index.sqlite3'}")
    index.add_project("p", ls_project_id=1, root=tmp_path, label_config="<View/>")

    class Context:
        project_name = "p"
        writes = 0

        def __init__(self):
            self.index = self

        project = property(lambda self: index.project("p"))

        def set_typical(self, name, typical):
            self.writes += 1
            index.set_typical(name, typical)

    yield Context()
    index.close()


def frozen(*samples):
    return SimpleNamespace(snapshot=SimpleNamespace(samples=samples))


def test_all_cells_and_each_modality_with_enough_of_them(context):
    samples = [
        *(sample(n, "fluo", 6, "holdout" if n % 2 else "train") for n in range(12)),
        *(sample(n, "bright", 12) for n in range(20, 29)),
        *(sample(n, "", 9) for n in range(30, 32)),
        sample(40, "bright", 3, "pseudo", cells=50),
    ]
    noted = note_typical(context, frozen(*samples))
    assert noted == context.project.typical
    assert {name: Typical.from_document(document).cells for name, document in noted.items()} == {"": 23, "fluo": 12}
    assert Typical.from_document(noted["fluo"]).median[0] == pytest.approx(np.log(samples[0].instances.masks[0].sum()))


def test_the_same_cells_are_noted_once(context):
    labelled = frozen(*(sample(n, "fluo", 6) for n in range(12)))
    first = note_typical(context, labelled)
    assert note_typical(context, labelled) == first
    assert context.writes == 1


def test_without_cells_nothing_is_typical_and_what_was_is_forgotten(context):
    assert note_typical(context, frozen()) == {}
    assert context.writes == 0
    note_typical(context, frozen(*(sample(n, "fluo", 6) for n in range(12))))
    assert note_typical(context, frozen(*(sample(n, "fluo", 6) for n in range(9)))) == {}
    assert context.project.typical == {}
