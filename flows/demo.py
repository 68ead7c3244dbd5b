"""The demo: the whole loop on the sample images, with a simulated annotator who submits through Label Studio."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.annotator import label_tasks
from flows.context import LoopContext, open_context
from flows.deploy import deploy
from flows.local.workspace import Workspace
from flows.round import run_round
from flows.start import start_project
from flows.sync import sync
from flows.telling import Tell
from loop.adapters.index import AnnotationRow, RoundRow
from loop.config import LoopConfig
from loop.errors import StateError

logger = logging.getLogger(__name__)

PROJECT = "demo"
EXAMPLE = Path(__file__).parents[1] / "examples" / "dsb2018-mini"


@dataclass(frozen=True)
class DemoRound:
    """One line of the demo's table: what had been labelled, how the model did on the hold-out, and its pseudo-labels.

    `mixed_ap` and `labelled_ap` are those of the challengers with and without pseudo-labels, None where there was one;
    `pseudo_cells` of `pseudo_images` unlabelled images taught, `pseudo` says why or why not.
    """

    round: int
    images_labelled: int
    cells_labelled: int
    hold_out_images: int
    ap: float
    ap50: float
    champion_ap: float | None
    decision: str
    reason: str
    mixed_ap: float | None = None
    labelled_ap: float | None = None
    pseudo_images: int = 0
    pseudo_cells: int = 0
    pseudo: str = ""


@dataclass(frozen=True)
class DemoReport:
    """What the demo shows at its end."""

    rounds: tuple[DemoRound, ...]
    report: str
    label_studio_project: int
    next_images: tuple[str, ...]


def run_demo(workspace: Workspace, config: LoopConfig, tell: Tell, example: Path = EXAMPLE) -> DemoReport:
    """12 images labelled at random, a round, 8 more in the order that the loop chose, a second round.

    The numbers of images are those of `select.first_batch` and `select.batch`. Each step continues where an
    interrupted demo stopped.

    Raises:
        StateError: the sample images are not there.
    """
    if not example.is_dir():
        raise StateError(f"the sample images are not at {example}; run the demo in a clone of the repository")
    started = start_project(workspace, example, PROJECT, config, tell=tell)
    context = open_context(workspace, PROJECT)
    deploy(context)
    run_round(context, tell)
    goal = 0
    for batch in (config.select.first_batch, config.select.batch):
        goal += batch
        _label_up_to(context, example / "labels", goal, tell)
        run_round(context, tell)
    queue = [row for row in context.index.images(PROJECT, state="open") if row.rank is not None]
    following = tuple(row.image_id for row in sorted(queue, key=lambda row: row.rank or 0))
    page = workspace.root / "reports" / f"{PROJECT}.html"
    lines = demo_rounds(context.index.rounds(PROJECT), context.index.annotations(PROJECT))
    return DemoReport(lines, str(page), started.label_studio_project, following)


def _label_up_to(context: LoopContext, labels: Path, goal: int, tell: Tell) -> None:
    """Labels in the served order until `goal` images have a label; those of an interrupted demo count."""
    sync(context)
    missing = goal - len(context.index.images(PROJECT, state="labelled"))

    def told(done: int, count: int) -> None:
        tell("annotator", done, count)

    label_tasks(context, labels, missing, told)


def demo_rounds(rounds: Sequence[RoundRow], annotations: Sequence[AnnotationRow]) -> tuple[DemoRound, ...]:
    """The finished rounds that had labels to look at, as the index knows them, whichever run of the demo made them.

    An image counts once however many annotations it has, its cells are those of the newest that the round knew.
    """
    lines = []
    for row in rounds:
        newest: dict[str, AnnotationRow] = {}
        for annotation in sorted(annotations, key=lambda item: (item.updated_at, item.annotation_id)):
            used = annotation.used_in_round
            if used is not None and used <= row.number and not annotation.cancelled:
                newest[annotation.image_id] = annotation
        if row.status != "done" or not newest:
            continue
        metrics, pseudo = row.metrics, row.pseudo
        lines.append(
            DemoRound(
                row.number,
                len(newest),
                sum(annotation.n_regions for annotation in newest.values()),
                int(metrics.get("n_images", 0)),
                float(metrics.get("ap", 0.0)),
                float(metrics.get("ap50", 0.0)),
                float(metrics["champion_ap"]) if "champion_ap" in metrics else None,
                row.decision,
                row.reason,
                float(metrics["mixed_ap"]) if "mixed_ap" in metrics else None,
                float(metrics["labelled_ap"]) if "labelled_ap" in metrics else None,
                int(pseudo.get("images", 0)),
                int(pseudo.get("cells", 0)),
                str(pseudo.get("reason", "")),
            )
        )
    return tuple(lines)
