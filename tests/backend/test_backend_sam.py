"""Clicks that SAM answers: a small network of the same architecture with random weights."""

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from loop.data.embeddings import EmbeddingStore
from loop.models.sam import Sam
from loop.models.sam_weights import build_sam, load_sam
from loop.types import Instances


@pytest.fixture
def weights(tmp_path, small_sam):
    net = build_sam(small_sam)
    generator = torch.Generator().manual_seed(3)
    state = {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in net.state_dict().items()}
    torch.save(state, tmp_path / "small.pth")
    return tmp_path / "small.pth"


@pytest.fixture
def configs(tmp_path, weights):
    """configs(click settings) -> the folder of the projects' settings, SAM's weights named in them."""

    def write(checkpoint=weights, **click):
        (tmp_path / "configs").mkdir(exist_ok=True)
        tree = {"click": {"ahead": 0} | click, "pseudo": {"sam": {"checkpoint": str(checkpoint)}}}
        (tmp_path / "configs" / "cells.yaml").write_text(yaml.safe_dump(tree))
        return tmp_path / "configs"

    return write


@pytest.fixture
def encoded(monkeypatch):
    """The images that the encoder was called for, as bytes."""
    seen = []
    encode = Sam.encode

    def spy(self, image, *, pause=None):
        seen.append(image.tobytes())
        return encode(self, image, pause=pause)

    monkeypatch.setattr(Sam, "encode", spy)
    return seen


def _draw(b, number):
    """An image a task, each with other cells."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:512, :512] + 0.5
    picture = np.full((512, 512), 20.0)
    for cx, cy in rng.uniform(40, 470, (6, 2)):
        picture[(x - cx) ** 2 + (y - cy) ** 2 <= 30**2] = 200
    Image.fromarray(picture.astype(np.uint8)).save(b.display / f"image{number}.png")
    return f"image{number}.png"


def _prompts(b, seed):
    x, y = np.random.default_rng(seed).uniform(5, 95, 2)
    return [b.keypoints[0] | {"value": b.keypoints[0]["value"] | {"x": float(x), "y": float(y)}}]


def _shapes(reply):
    (prediction,) = reply.json()["results"]
    return [region["value"] for region in prediction["result"]], prediction["score"]


def _ready(b, eventually):
    eventually(lambda: b.parts.sams.of("cells") is not None, within_s=20)


def test_a_project_without_any_model_has_its_clicks_answered(backend, configs, eventually):
    with backend(configs_dir=configs()) as b:
        _ready(b, eventually)
        (prediction,) = b.click("two.png", *b.keypoints).json()["results"]
        assert prediction["model_version"] == "celloop-cells-r0"
        (region,) = prediction["result"]
        assert region["value"]["polygonlabels"] == ["Cell"]
        assert 0 < prediction["score"] <= 1
        assert b.metric("celloop_click_answers_total", project="cells", by="sam") == 1
        assert b.predict("two.png").status_code == 503
        b.index.set_published("cells", "celloop-cells-r0-2", "")
        time.sleep(1.1)
        assert b.click("two.png", *b.keypoints).json()["results"][0]["model_version"] == "celloop-cells-r0-2"


def test_with_a_champion_sam_still_answers_and_the_version_is_the_champions(backend, configs, eventually):
    with backend("bright", configs_dir=configs()) as b:
        _ready(b, eventually)
        reply = b.click("two.png", *b.keypoints).json()["results"][0]
        assert reply["model_version"] == "celloop-cells-v1"
        assert b.metric("celloop_click_answers_total", project="cells", by="sam") == 1
        dead = {"labels": ["Dead"], "keypointlabels": ["Dead"]}
        prompts = [point | {"value": point["value"] | dead} for point in b.keypoints]
        (region,) = b.click("two.png", *prompts).json()["results"][0]["result"]
        assert region["value"]["polygonlabels"] == ["Dead"]


def test_the_setting_may_keep_the_champion(backend, configs, eventually):
    with backend("bright", configs_dir=configs()) as b:
        _ready(b, eventually)
        configs(model="champion")
        b.click("two.png", b.keypoints[0])
        assert b.metric("celloop_click_answers_total", project="cells", by="champion") == 1
        eventually(lambda: not b.parts.sams._held)  # nobody asks for it any more
        configs(model="sam")
        _ready(b, eventually)
        b.click("two.png", b.keypoints[0])
        assert b.metric("celloop_click_answers_total", project="cells", by="sam") == 1


@pytest.mark.parametrize(("model", "failures", "word"), [("auto", None, "no weights"), ("sam", 1, "CheckpointError")])
def test_without_weights_the_champion_answers_and_the_log_says_why_once(
    backend, configs, caplog, eventually, model, failures, word
):
    caplog.set_level("INFO", "backend.sam_slot")
    with backend("bright", configs_dir=configs(checkpoint="/nowhere/sam.pth", model=model)) as b:
        eventually(lambda: "clicks in cells are answered by the champion" in caplog.text)
        time.sleep(0.2)
        (region,) = b.click("two.png", b.keypoints[0]).json()["results"][0]["result"]
        assert region["type"] == "polygonlabels"
        assert b.metric("celloop_click_answers_total", project="cells", by="champion") == 1
        assert b.metric("celloop_failures_total", kind="CheckpointError") == failures
        (line,) = [record.message for record in caplog.records if record.name == "backend.sam_slot"]
        assert word in line
        assert "/nowhere/sam.pth" in line


def test_weights_that_are_damaged_leave_the_champion_and_are_tried_again(backend, configs, weights, caplog, eventually):
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with backend("bright", configs_dir=configs(), retry_s=0.1) as b:
        eventually(lambda: b.metric("celloop_failures_total", kind="CheckpointError"))
        assert b.click("two.png", b.keypoints[0]).status_code == 200
        weights.write_bytes(whole)
        _ready(b, eventually)
    assert "truncated" in caplog.text


def test_while_sam_is_loaded_the_champion_answers_at_once(backend, configs, monkeypatch, eventually):
    release = threading.Event()
    monkeypatch.setattr(
        "backend.app.load_weights", lambda w, device: (release.wait(20), load_sam(*w, device=device))[1]
    )
    with backend("bright", configs_dir=configs()) as b:
        assert b.click("two.png", b.keypoints[0]).status_code == 200
        assert b.metric("celloop_click_answers_total", project="cells", by="champion") == 1
        release.set()
        _ready(b, eventually)


def test_projects_with_the_same_weights_share_one_sam(backend, configs, eventually):
    with backend(configs_dir=configs()) as b:
        b.index.add_project("more", ls_project_id=4, root=b.display, label_config=b.config)
        (configs() / "more.yaml").write_text((configs() / "cells.yaml").read_text())
        eventually(lambda: b.parts.sams.of("more") is not None, within_s=20)
        assert b.parts.sams.of("more") is b.parts.sams.of("cells")


def test_many_people_on_different_images_get_what_one_would(backend, configs, encoded, eventually, tmp_path):
    def ask(b, name, seed):
        return _shapes(b.click(name, *_prompts(b, seed)))

    with backend(configs_dir=configs()) as b:
        names = [_draw(b, i) for i in range(4)]
        _ready(b, eventually)
        alone = {(name, seed): ask(b, name, seed) for name in names for seed in range(8)}
    assert len(set(map(str, alone.values()))) > 8
    encoded.clear()
    with backend(configs_dir=configs()) as b:
        names = [_draw(b, i) for i in range(4)]
        _ready(b, eventually)
        jobs = [(name, seed) for seed in range(8) for name in names]
        with ThreadPoolExecutor(8) as pool:
            together = dict(zip(jobs, pool.map(lambda job: ask(b, *job), jobs), strict=True))
        assert together == alone
        assert len(encoded) == len(set(encoded)) == 4
        assert b.metric("celloop_click_embeddings_total", result="miss") >= 4


def test_after_a_restart_images_are_still_encoded(backend, configs, encoded, eventually, tmp_path):
    replies = []
    for _ in range(2):
        with backend(configs_dir=configs(), embeddings_dir=tmp_path / "embeddings") as b:
            _ready(b, eventually)
            replies += [_shapes(b.click("two.png", *b.keypoints)) for _ in range(2)]
            disk = b.metric("celloop_click_embeddings_total", result="disk")
    assert len(encoded) == 1
    assert disk == 1
    assert replies[2] == replies[3]
    assert abs(replies[0][1] - replies[2][1]) < 0.01
    (path,) = (tmp_path / "embeddings").rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with backend(configs_dir=configs(), embeddings_dir=tmp_path / "embeddings") as b:
        _ready(b, eventually)
        assert _shapes(b.click("two.png", *b.keypoints)) == replies[0]
        assert len(encoded) == 2


def test_embeddings_that_are_not_this_networks_are_made_again(backend, configs, encoded, eventually, tmp_path, caplog):
    with backend(configs_dir=configs(), embeddings_dir=tmp_path / "embeddings") as b:
        _ready(b, eventually)
        first = _shapes(b.click("two.png", *b.keypoints))
        (path,) = (tmp_path / "embeddings").rglob("*.safetensors")
    arrays = {"features": np.zeros((1, 2), np.float16)}
    EmbeddingStore(tmp_path / "embeddings", 10**6).put(path.stem, path.parent.name, arrays)
    with backend(configs_dir=configs(), embeddings_dir=tmp_path / "embeddings") as b:
        _ready(b, eventually)
        assert _shapes(b.click("two.png", *b.keypoints)) == first
    assert len(encoded) == 2
    assert "is not used" in caplog.text


def test_nothing_is_kept_on_disk_where_the_settings_say_so(backend, configs, eventually, tmp_path):
    with backend(configs_dir=configs(store_mb=0), embeddings_dir=tmp_path / "embeddings") as b:
        _ready(b, eventually)
        b.click("two.png", *b.keypoints)
        b.click("two.png", *b.keypoints)
        assert b.metric("celloop_click_embeddings_total", result="hit") == 1
        assert b.metric("celloop_click_embedding_bytes") == 16 * 4 * 4 * 4
    assert not list((tmp_path / "embeddings").rglob("*.safetensors"))


def test_a_click_in_an_encoded_image_waits_for_no_batch(backend, configs, eventually):
    with backend("slow", configs_dir=configs()) as b:
        _ready(b, eventually)
        b.click("empty.png", b.keypoints[0])
        tasks = [b.task("two.png", i) for i in range(30)]
        batch = threading.Thread(target=lambda: b.predict_tasks(tasks))
        batch.start()
        time.sleep(0.3)
        for _ in range(5):
            before = len(b.slow_calls)
            assert b.click("empty.png", b.keypoints[0]).status_code == 200
            assert len(b.slow_calls) - before <= 2
        b.parts.service.stop()
        batch.join()


def test_usual_cells_of_the_images_modality_are_asked_for(backend, configs, eventually, monkeypatch, caplog):
    asked = []

    def answer(sam, embedding, prompts, *, typical, **named):
        asked.append(typical)
        return Instances.build(embedding.shape)

    monkeypatch.setattr("backend.answerers.sam_cell_at", answer)

    def documents(cells):
        numbers = {"median": 1.0, "spread": 1.0}
        return {"cells": cells, "log_area": numbers, "solidity": numbers, "elongation": numbers}

    with backend(configs_dir=configs()) as b:
        _ready(b, eventually)
        b.index.set_typical("cells", {"": documents(1), "purple": documents(2), "broken": {"cells": "many"}})
        for modality in ("purple", "grey", None, "broken", "broken"):
            task = b.task("two.png", 1)
            task["data"]["modality"] = modality
            body = b.body([task], params={"context": {"result": [b.keypoints[0]]}})
            assert b.post("/predict", body).status_code == 200
        configs(typical=False)
        b.click("two.png", b.keypoints[0])
    assert [typical and typical.cells for typical in asked] == [2, 1, 1, None, None, None]
    assert caplog.text.count("SAM's own scores alone") == 1


@pytest.mark.parametrize("checkpoint", ["~nobody-of-this-name/sam.pth", "forbidden/sam.pth"])
def test_a_file_that_cannot_even_be_looked_for_does_not_end_the_search(
    backend, configs, weights, monkeypatch, caplog, eventually, checkpoint
):
    is_file = Path.is_file

    def looked_at(path):
        if "forbidden" in path.parts:
            raise PermissionError(13, "denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", looked_at)
    with backend("bright", configs_dir=configs(checkpoint=checkpoint, model="sam")) as b:
        eventually(lambda: "by the champion instead of SAM" in caplog.text)
        assert b.click("two.png", b.keypoints[0]).status_code == 200
        configs()
        _ready(b, eventually)
        assert b.parts.sams._thread.is_alive()


def test_weights_that_are_replaced_under_the_same_path_are_taken_into_service(
    backend, configs, weights, encoded, caplog, eventually
):
    with backend(configs_dir=configs(), retry_s=0.1) as b:
        _ready(b, eventually)
        first = b.parts.sams.of("cells").version
        shapes = _shapes(b.click("two.png", *b.keypoints))
        whole = weights.read_bytes()
        weights.write_bytes(whole[:1000])
        eventually(lambda: f"by SAM {first} still" in caplog.text)
        weights.unlink()
        time.sleep(0.2)
        assert _shapes(b.click("two.png", *b.keypoints)) == shapes
        state = torch.load(io.BytesIO(whole), weights_only=True)
        torch.save({name: -value for name, value in state.items()}, weights)
        eventually(lambda: b.parts.sams.of("cells").version != first, within_s=20)
        b.click("two.png", *b.keypoints)
        assert len(encoded) == 2
        assert b.metric("celloop_sam_info", sam=first) is None
