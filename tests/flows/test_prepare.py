import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from flows.prepare import prepare
from loop.config import LoopConfig
from loop.data.embeddings import EmbeddingStore, to_encode
from loop.data.store import file_sha256, read_image, write_png
from loop.data.synthetic import draw_cells
from loop.models.sam_weights import Architecture, build_sam, load_sam
from loop.types import Selection

SMALL = Architecture(32, 2, 4, 2.0, 64, 16, 3, (1,), 16, 8, 3, 2, 24, 3, 12)
BATCH = [Selection(f"i{i}", i + 1, False, "") for i in range(3)]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    net = build_sam(SMALL)
    state = {name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in net.state_dict().items()}
    torch.save(state, tmp_path / "small.pth")
    return tmp_path / "small.pth"


def _context(tmp_path: Path, weights: str | Path, **click: Any) -> Any:
    for i in range(3):
        path = tmp_path / "display" / "p" / f"i{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(draw_cells(np.random.default_rng(i), (48, 56), 4)[0], path)
    config = LoopConfig.model_validate(
        {"click": click, "pseudo": {"sam": {"checkpoint": str(weights)}}, "train": {"device": "cpu"}}
    )
    folders = SimpleNamespace(display_dir=tmp_path / "display", embeddings_dir=tmp_path / "embeddings")
    return cast(Any, SimpleNamespace(workspace=folders, config=config, project_name="p"))


def test_the_batch_is_encoded_once_under_the_hash_of_what_is_shown(tmp_path: Path, weights: Path) -> None:
    context = _context(tmp_path, weights)
    told: list[tuple[int, int]] = []
    assert prepare(context, BATCH[:2], lambda done, total: told.append((done, total))) == 2
    assert told == [(1, 2), (2, 2)]
    assert prepare(context, BATCH) == 1
    assert prepare(context, BATCH) == 0
    sam = load_sam("vit_b", str(weights), device="cpu")
    store = EmbeddingStore(tmp_path / "embeddings", 10**9)
    for i in range(3):
        path = tmp_path / "display" / "p" / f"i{i}.png"
        arrays = store.get(file_sha256(path), sam.version)
        assert arrays is not None
        expected = sam.encode(to_encode(read_image(path).pixels))
        found = sam.embedding(arrays)
        assert found.shape == expected.shape == (48, 56)
        np.testing.assert_allclose(found.features, expected.features, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("click", [{"model": "champion"}, {"store_mb": 0}])
def test_settings_may_say_no(tmp_path: Path, weights: Path, click: dict[str, Any]) -> None:
    assert prepare(_context(tmp_path, weights, **click), BATCH) == 0
    assert not (tmp_path / "embeddings").exists()


@pytest.mark.parametrize(("model", "level"), [("auto", logging.INFO), ("sam", logging.WARNING)])
def test_without_weights_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model: str, level: int
) -> None:
    caplog.set_level(logging.INFO)
    assert prepare(_context(tmp_path, tmp_path / "none.pth", model=model), BATCH) == 0
    (record,) = caplog.records
    assert record.levelno == level
    assert "none.pth" in record.message


def test_an_image_that_cannot_be_read_is_named_and_the_others_go_on(
    tmp_path: Path, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = _context(tmp_path, weights)
    (tmp_path / "display" / "p" / "i1.png").write_bytes(b"")
    assert prepare(context, BATCH) == 2
    assert "i1 is not encoded" in caplog.text
    assert prepare(context, []) == 0


def test_what_is_there_already_is_read_so_that_it_is_whole_and_not_the_next_to_go(
    tmp_path: Path, weights: Path
) -> None:
    context = _context(tmp_path, weights)
    assert prepare(context, BATCH) == 3
    files = {file_sha256(tmp_path / "display" / "p" / f"i{i}.png"): i for i in range(3)}
    for path in (tmp_path / "embeddings").rglob("*.safetensors"):
        os.utime(path, (1, 1))
        if files[path.stem] == 1:
            path.write_bytes(path.read_bytes()[:50])
    assert prepare(context, BATCH) == 1
    times = [path.stat().st_mtime for path in (tmp_path / "embeddings").rglob("*.safetensors")]
    assert len(times) == 3
    assert min(times) > 1
