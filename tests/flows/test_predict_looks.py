from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from flows import predict
from flows.predict import predict_images
from loop.config import InstanceConfig, LoopConfig, ModelConfig
from loop.data.predictions import PredictionStore, StoredPrediction
from loop.data.store import describe, write_png
from loop.data.synthetic import draw_cells
from loop.errors import ConfigError
from loop.models import new_net
from loop.models.segmenter import Segmenter
from loop.types import ImageRef
from loop.uncertainty.measures import FROM_ONE_LOOK, MEASURES

VERSION = cast(Any, SimpleNamespace(label="celloop-p-v1"))


class Hall:
    """A project of three images, and a network of which every look is counted."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
        self.folder, self.looked = folder, 0
        self.images = [self._image(i) for i in range(3)]
        model = ModelConfig(base=4, depth=2, dropout=dropout)
        hall = self

        class Counting(Segmenter):
            def predict(self, *given: Any, **named: Any) -> Any:
                hall.looked += 1
                return super().predict(*given, **named)

            def with_net(self, change: Any) -> Segmenter:
                other = super().with_net(change)
                look = other.look

                def counted(*given: Any, **named: Any) -> Any:
                    hall.looked += 1
                    return look(*given, **named)

                monkeypatch.setattr(other, "look", counted)
                return other

        settings = InstanceConfig(min_score=0.0, min_area=1)
        found = Counting(new_net(model, 0), model, settings, device="cpu", precision="fp32", model_version="v1")
        monkeypatch.setattr(predict, "load_segmenter", lambda *_: found)

    def _image(self, i: int) -> ImageRef:
        pixels, _ = draw_cells(np.random.default_rng(i), (48, 56), 4)
        path = self.folder / f"i{i}.png"
        write_png(pixels, path)
        return describe(path)

    def run(self, passes: str, n: int = 3, **named: Any) -> tuple[dict[str, StoredPrediction], int]:
        """The predictions, and how often images were looked at for them."""
        config = LoopConfig.model_validate({"select": {"passes": passes, "n_passes": n}})
        workspace = SimpleNamespace(predictions_dir=self.folder / "predictions")
        before = self.looked
        context = cast(Any, SimpleNamespace(config=config, workspace=workspace))
        return dict(predict_images(context, VERSION, self.images, **named)), self.looked - before


@pytest.fixture
def hall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hall:
    return Hall(tmp_path, monkeypatch, dropout=0.4)


def test_once_gives_the_measures_of_one_look_and_is_not_done_twice(hall: Hall) -> None:
    first, looked = hall.run("once")
    assert looked == 3
    assert all(tuple(stored.measures) == FROM_ONE_LOOK for stored in first.values())
    again, looked = hall.run("once")
    assert looked == 0
    assert {name: stored.measures for name, stored in again.items()} == {
        name: stored.measures for name, stored in first.items()
    }


@pytest.mark.parametrize("passes", ["turns", "dropout"])
def test_several_looks_are_added_to_what_is_stored_and_kept(hall: Hall, passes: str) -> None:
    once, _ = hall.run("once")
    assert hall.run(passes, again=False)[1] == 0
    often, looked = hall.run(passes)
    assert looked == 3 * 3
    for name, stored in often.items():
        assert tuple(stored.measures) == MEASURES
        assert stored.looks == f"{passes} x 3"
        assert stored.measures["bald"] > 0
        assert {key: stored.measures[key] for key in FROM_ONE_LOOK} == once[name].measures
    assert hall.run(passes)[1] == hall.run("once")[1] == 0


def test_looks_of_another_kind_or_number_are_taken_again(hall: Hall) -> None:
    turned, looked = hall.run("turns")
    assert looked == 3 * (1 + 3)
    blanked, looked = hall.run("dropout")
    assert looked == 3 * 3
    assert all(turned[name].measures["bald"] != blanked[name].measures["bald"] for name in turned)
    assert hall.run("dropout", 4)[1] == 3 * 4
    assert hall.run("dropout", 4)[0]["i0"].looks == "dropout x 4"


def test_a_prediction_of_before_measures_is_made_again(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    whole, _ = hall.run("once")
    store = PredictionStore(hall.folder / "predictions", VERSION.label)
    kept = whole["i1"]
    store.save(hall.images[1], StoredPrediction(kept.instances, kept.uncertainty, kept.embedding))
    again, looked = hall.run("once")
    assert looked == 1
    assert again["i1"].measures == kept.measures
    assert not caplog.records


def test_an_image_that_became_another_is_named_and_left_out(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    hall.run("once")
    write_png(np.zeros((20, 20, 3), np.uint8), hall.images[2].path)
    found, _ = hall.run("turns")
    assert set(found) == {"i0", "i1"}
    assert "i2 is not predicted" in caplog.text


def test_dropout_of_a_model_without_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"model\.dropout"):
        Hall(tmp_path, monkeypatch, dropout=0.0).run("dropout")
