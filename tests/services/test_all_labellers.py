"""Every labeller that needs no package of its own, once round the real stack on real images."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.annotator import label_tasks
from flows.audit import proposal_store
from flows.context import LoopContext, image_ref, open_context
from flows.deploy import deploy
from flows.local.workspace import Workspace
from flows.round import RoundReport, run_round
from flows.start import start_project
from loop.config import load_config
from loop.data.folder import open_folder
from loop.models.sam_weights import Architecture, build_sam

pytestmark = pytest.mark.services

NAME = "all-labellers"
EXAMPLE = Path(__file__).parents[2] / "examples" / "dsb2018-mini"
LABELLERS = ("champion", "unet", "sparse_seu_net", "pix2pix", "sam")
SETTINGS: dict[str, Any] = {
    "model.base": 8,
    "model.depth": 3,
    "model.queries": 60,
    "train.max_steps": 30,
    "train.crop": 96,
    "train.learning_rate": 0.004,
    "select.first_batch": 8,
    "select.batch": 6,
    "gate.min_images": 2,
    "pseudo.labellers": LABELLERS,
    "pseudo.calibrate_cells": 10,
    "pseudo.views": 2,
    "pseudo.images": 4,
    "pseudo.sam.mode": "both",
    "pseudo.sam.points_per_side": 2,
}


def write_small_sam(path: Path, sizes: Architecture) -> None:
    """A SAM of the real architecture with random weights."""
    net = build_sam(sizes).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    torch.save(net.state_dict(), path)


@pytest.fixture(scope="module")
def context(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory, small_sam: Architecture) -> LoopContext:
    """A project of 18 real images, the smallest of the sample, with a small SAM of random weights."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "images").mkdir()
    smallest = sorted(open_folder(EXAMPLE).images, key=lambda ref: (ref.height * ref.width, ref.image_id))[:18]
    for ref in smallest:
        shutil.copy(ref.path, folder / "images")
    write_small_sam(folder / "small.pth", small_sam)
    config = load_config(None, {**SETTINGS, "pseudo.sam.checkpoint": str(folder / "small.pth")})
    start_project(workspace, folder, NAME, config)
    opened = open_context(workspace, NAME)
    deploy(opened)
    return opened


@pytest.fixture(scope="module")
def report(context: LoopContext) -> RoundReport:
    """The third round: the first only draws, the second trains every kind, then all of them propose."""
    run_round(context)
    for count in (8, 6):
        label_tasks(context, EXAMPLE / "labels", count)
        last = run_round(context)
    return last


def test_each_of_them_proposes_in_the_round(context: LoopContext, report: RoundReport) -> None:
    assert report.pseudo["missing"] == {}
    found = report.pseudo["labellers"]
    assert set(found) == set(LABELLERS)
    assert {name: said["skipped"] for name, said in found.items()} == {name: [] for name in LABELLERS}
    assert found["sam"]["version"].startswith("sam:")
    for name in ("unet", "sparse_seu_net", "pix2pix"):
        assert found[name]["version"].startswith(f"celloop-{NAME}.{name}-v")


def test_their_proposals_are_stored_for_real_images(context: LoopContext, report: RoundReport) -> None:
    labelled = [image_ref(row) for row in context.index.images(NAME, state="labelled")]
    for name in LABELLERS:
        store = proposal_store(context, name, report.pseudo["labellers"][name]["version"])
        stored = [proposal for image in labelled if (proposal := store.load(image)) is not None]
        assert stored, name
        for proposal in stored:
            assert ((proposal.instances.scores >= 0) & (proposal.instances.scores <= 1)).all()
            assert ((proposal.stability >= 0) & (proposal.stability <= 1)).all()
