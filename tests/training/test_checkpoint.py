import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loop.config import InstanceConfig, ModelConfig
from loop.errors import CheckpointError
from loop.models import SEGMENTERS
from loop.training.checkpoint import load_checkpoint, save_checkpoint

MODEL = ModelConfig(base=4, depth=2, in_channels=1)
INSTANCES = InstanceConfig(foreground=0.4, min_area=7)


@pytest.fixture
def directory(tmp_path):
    target = tmp_path / "deep" / "model"
    save_checkpoint(
        target, SEGMENTERS["seu_net"](MODEL), MODEL, INSTANCES, snapshot_id="abc", minutes=1.5, steps=12,
        extra={"note": "x"},
    )  # fmt: skip
    return target


def edit(directory, **changes):
    path = directory / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_everything_comes_back(directory):
    loaded = load_checkpoint(directory, device="cpu")
    assert loaded.model_config == MODEL
    assert loaded.instance_config == INSTANCES
    assert {k: loaded.meta[k] for k in ("snapshot_id", "minutes", "steps", "extra")} == {
        "snapshot_id": "abc", "minutes": 1.5, "steps": 12, "extra": {"note": "x"},
    }  # fmt: skip
    assert loaded.meta["normalisation"]["upper_pct"] == 99.8
    assert not loaded.net.training


def test_only_the_two_files_are_written_and_saving_again_overwrites(directory):
    assert sorted(p.name for p in directory.iterdir()) == ["model.json", "model.safetensors"]
    net = SEGMENTERS["seu_net"](MODEL)
    save_checkpoint(directory, net, MODEL, INSTANCES, steps=99)
    loaded = load_checkpoint(directory, device="cpu")
    assert loaded.meta["steps"] == 99
    for left, right in zip(net.parameters(), loaded.net.parameters(), strict=True):
        assert torch.equal(left, right)


def test_missing_files_are_named(directory, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere/model\.json.*No such file"):
        load_checkpoint(tmp_path / "nowhere")
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load_checkpoint(directory)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_truncated_weights_are_refused(directory, share):
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"truncated or no safetensors"):
        load_checkpoint(directory)


def test_a_truncated_description_is_refused(directory):
    path = directory / "model.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(CheckpointError, match=r"model\.json is no JSON"):
        load_checkpoint(directory)


def test_another_format_architecture_or_setting_is_refused_with_what_was_found(directory):
    edit(directory, format=9)
    with pytest.raises(CheckpointError, match="format 9; this version reads format 2"):
        load_checkpoint(directory)
    edit(directory, format=2, architecture="mask_rcnn")
    with pytest.raises(CheckpointError, match=r"'mask_rcnn'.*knows .*seu_net"):
        load_checkpoint(directory)
    edit(directory, architecture="seu_net", model={"base": 4, "wings": 2})
    with pytest.raises(CheckpointError, match="wings"):
        load_checkpoint(directory)
    (directory / "model.json").write_text("[]")
    with pytest.raises(CheckpointError, match="format 'list'"):
        load_checkpoint(directory)


def test_weights_of_another_size_are_refused_with_both_shapes(directory):
    edit(directory, model={**MODEL.model_dump(), "base": 8})
    with pytest.raises(CheckpointError, match=r"is \(8, 24, 3, 3\), expected \(16, 48, 3, 3\).*more"):
        load_checkpoint(directory)
    edit(directory, model={**MODEL.model_dump(), "depth": 3})
    with pytest.raises(CheckpointError, match="is missing"):
        load_checkpoint(directory)


def test_weights_with_nan_are_refused(directory):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 1)
    tensors[name][0] = np.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN"):
        load_checkpoint(directory)


@pytest.mark.parametrize("other", ["unet", "sparse_seu_net"])
def test_the_weights_of_another_architecture_are_refused(directory, other):
    edit(directory, architecture=other, model={**MODEL.model_dump(), "name": other})
    with pytest.raises(CheckpointError, match=r"do not fit the model .* is (missing|unknown).* more; both files"):
        load_checkpoint(directory)


@pytest.mark.parametrize("heads", [["interior", "border", "background"], ["interior"]])
@pytest.mark.parametrize("decoders", ["shared", "decoupled"])
def test_weights_with_other_heads_are_refused(directory, heads, decoders):
    edit(directory, model={**MODEL.model_dump(), "heads": heads, "decoders": decoders})
    with pytest.raises(CheckpointError, match="do not fit the model"):
        load_checkpoint(directory)


def test_a_checkpoint_of_the_first_format_is_refused(directory):
    edit(directory, format=1)
    with pytest.raises(CheckpointError, match=r"format 1; this version reads format 2; .*celloop train"):
        load_checkpoint(directory)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "model", SEGMENTERS["seu_net"](MODEL), MODEL, INSTANCES)
