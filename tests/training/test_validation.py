import numpy as np
import pytest
import torch
from torch import nn

from loop.config import InstanceConfig, ModelConfig, TrainConfig
from loop.data.store import read_image, write_png
from loop.data.synthetic import draw_cells
from loop.errors import ImageError, NonFiniteError, ShapeError
from loop.metrics.instance import evaluate
from loop.models import new_net
from loop.models.segmenter import Segmenter
from loop.training import validation as module
from loop.training.trainer import train
from loop.training.validation import DENSE_GRID, SPARSE_GRID, Validation
from loop.types import ImageRef, Sample

DENSE = ModelConfig(base=4, depth=2)
SPARSE = ModelConfig(name="sparse_seu_net", base=4, depth=2, queries=16, width=8)
CONFIG = TrainConfig(max_steps=20, crop=32, batch=2, device="cpu", precision="fp32", warmup_steps=3)


def config(**changes):
    return TrainConfig(**{**CONFIG.model_dump(), **changes})


def silent(step, values):
    return None


@pytest.fixture
def samples(tmp_path):
    found = []
    for i in range(4):
        pixels, cells = draw_cells(np.random.default_rng(i), (64, 64), 5)
        write_png(pixels, tmp_path / f"{i}.png")
        modality = "bright" if i % 2 else "dim"
        found.append(Sample(ImageRef(f"{i}", tmp_path / f"{i}.png", "", 64, 64, 3, modality=modality), cells))
    return found


def worth(net, model, thresholds, samples):
    """The mean that is raised, from whole predictions."""
    segmenter = Segmenter(net, model, thresholds, device="cpu", precision="fp32")
    pairs = [(segmenter.predict(read_image(s.image.path).pixels).instances, s.instances) for s in samples]
    figures = evaluate(pairs, modalities=[s.image.modality for s in samples])
    return np.mean([figures[key] for key in ("ap", "ap50", "macro_ap", "f1")]), figures


@pytest.mark.parametrize(("model", "grid"), [(DENSE, DENSE_GRID), (SPARSE, SPARSE_GRID)], ids=["dense", "sparse"])
def test_fitted_thresholds_are_no_worse_than_the_start(samples, model, grid, capfd):
    start = InstanceConfig(min_area=5, tile=64, floor=0.45, min_score=0.83)
    model = ModelConfig(**{**model.model_dump(), "base": 8})
    plain = config(max_steps=50, learning_rate=1e-2, crop=64, scale_jitter=1, rotate=0, elastic=0, intensity=0.2)
    trained = train(samples[:2], model, plain, log=silent)
    fitted, figures = Validation(samples, model, CONFIG, start).fit(trained.net)
    before, _ = worth(trained.net, model, start, samples)
    after, measured = worth(trained.net, model, fitted, samples)
    assert after >= before
    assert figures == {key: pytest.approx(measured[key]) for key in ("ap", "ap50", "macro_ap", "f1")}
    assert figures["f1"] > 0.2
    changed = {name for name in type(start).model_fields if getattr(fitted, name) != getattr(start, name)}
    assert changed <= set(grid)
    assert capfd.readouterr().out == ""


def test_training_with_validation_gives_the_same_weights_as_without(samples):
    told = []
    without = train(samples[:2], DENSE, config(max_steps=12), log=silent)
    seen = train(samples[:2], DENSE, config(max_steps=12), log=lambda *args: told.append(args), validation=samples[2:])
    assert without.losses == seen.losses
    for left, right in zip(without.net.parameters(), seen.net.parameters(), strict=True):
        assert torch.equal(left, right)
    assert [step for step, values in told if "validation_ap" in values] == [4, 6, 9, 11]
    assert all({"loss", "seconds", "learning_rate", "seconds_left"} <= set(values) for _, values in told)
    assert without.validation is None
    assert seen.validation is not None


def test_without_images_or_validations_none_happens(samples, monkeypatch):
    monkeypatch.setattr(Validation, "ap", lambda self, net: pytest.fail("validated"))
    train(samples[:2], DENSE, config(max_steps=8), log=silent)
    done = train(samples[:2], DENSE, config(max_steps=8, validations=0, patience=1), log=silent, validation=samples[2:])
    assert done.steps == 8
    assert set(done.validation) == {"ap", "ap50", "macro_ap", "f1"}


def run_with(sequence, samples, monkeypatch, **changes):
    """A training whose validations find these APs; the averaged weights that each of them saw, and what was told."""
    seen, told = [], []
    aps = iter(sequence)

    def ap(self, net):
        assert not net.training
        seen.append([p.detach().clone() for p in net.parameters()])
        return next(aps)

    monkeypatch.setattr(Validation, "ap", ap)
    trained = train(
        samples[:2], DENSE, config(**changes), log=lambda *args: told.append(args), validation=samples[2:]
    )  # fmt: skip
    return trained, seen, told


def same(net, weights):
    return all(torch.equal(left, right) for left, right in zip(net.parameters(), weights, strict=True))


def test_patience_ends_it_with_the_weights_of_the_best_validation(samples, monkeypatch):
    trained, seen, told = run_with(
        [0.1, 0.4, 0.4, 0.2, 0.9], samples, monkeypatch, max_steps=20, validations=9, patience=2
    )
    assert (len(seen), trained.steps) == (4, 9)
    assert same(trained.net, seen[1])
    assert not same(trained.net, seen[3])
    last = told[-1][1]
    assert (told[-1][0], last["validation_ap"], last["seconds_left"] >= 0) == (9, 0.2, True)


@pytest.mark.parametrize(("end", "best"), [(0.9, 2), (0.3, 0)])
def test_with_patience_the_end_is_measured_too(samples, monkeypatch, end, best):
    trained, seen, _ = run_with([0.5, 0.4, end], samples, monkeypatch, max_steps=12, validations=2, patience=5)
    assert (len(seen), trained.steps) == (3, 12)
    assert same(trained.net, seen[best])


def test_without_patience_the_weights_of_the_end_are_kept(samples, monkeypatch):
    trained, seen, _ = run_with([0.5, 0.4], samples, monkeypatch, max_steps=12, validations=2, patience=0)
    assert trained.steps == 12
    assert not any(same(trained.net, weights) for weights in seen)


def test_of_many_images_some_of_each_modality_are_used(samples, monkeypatch):
    many = [Sample(ImageRef(f"{i}", samples[0].image.path, "", 64, 64, 3, modality="rare" if i == 7 else "common"),
                   samples[0].instances) for i in range(40)]  # fmt: skip
    used = Validation(many, DENSE, CONFIG, InstanceConfig())._samples
    assert len(used) == 24
    assert len({sample.image.image_id for sample in used}) == len(used)
    assert "rare" in [sample.image.modality for sample in used[:2]]
    for limits, n in (((24, 3 * 64 * 64), 3), ((5, 10**9), 5), ((24, 1), 1)):
        monkeypatch.setattr(module, "AT_THE_END", limits)
        assert len(Validation(many, DENSE, CONFIG, InstanceConfig())._samples) == n


def test_what_cannot_be_validated_on_is_named(samples, tmp_path):
    gone = Sample(ImageRef("gone", tmp_path / "gone.png", "", 64, 64, 3), samples[0].instances)
    with pytest.raises(ImageError, match=r"gone\.png cannot be read"):
        train(samples, DENSE, CONFIG, log=silent, validation=[gone])
    write_png(np.zeros((32, 64, 3), np.uint8), tmp_path / "small.png")
    small = Sample(ImageRef("small", tmp_path / "small.png", "", 32, 64, 3), samples[0].instances)
    with pytest.raises(ShapeError, match=r"small: the image is \(32, 64\) px, its cells are drawn on \(64, 64\)"):
        train(samples, DENSE, CONFIG, log=silent, validation=[small])


def test_a_net_that_gives_nan_is_refused_with_the_image(samples):
    net = new_net(DENSE).eval()
    nn.init.constant_(next(net.parameters()), float("nan"))
    judge = Validation(samples[:1], DENSE, CONFIG, InstanceConfig())
    for call in (judge.ap, judge.fit):
        with pytest.raises(NonFiniteError, match="image '0'"):
            call(net)


def test_a_patience_that_cannot_end_anything_is_said(samples, caplog):
    with caplog.at_level("WARNING"):
        train(samples[:1], DENSE, config(max_steps=1, patience=2), log=silent)
    assert any("train.patience=2 cannot end this training" in record.getMessage() for record in caplog.records)
