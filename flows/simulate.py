"""Active learning replayed on a labelled folder: which strategy would have paid, without a person's minute spent."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.telling import Tell
from loop.config import LoopConfig, load_config
from loop.data.folder import open_folder
from loop.data.store import file_sha256
from loop.data.text_file import write_text
from loop.effort.cost import CostModel
from loop.errors import InputError
from loop.replay.engine import ReplayPlan, Unit, check_strategies
from loop.replay.jobs import ReplayJob, replay
from loop.replay.plots import table, write_plots
from loop.replay.pool import cut
from loop.replay.summary import summarise

COMPACT: dict[str, Any] = {
    "model.name": "unet",
    "model.base": 16,
    "model.depth": 3,
    "train.crop": 48,
    "train.batch": 8,
    "train.max_steps": 1600,
    "train.validations": 0,
    "train.compile": "off",
    "instances.min_score": 0.5,
}
"""A small network with small crops: a minute of one core a training. What a replay uses unless settings are given."""

WINDOW = 256


@dataclass(frozen=True)
class SimulateReport:
    """Where a replay's results lie, and its summary: the document that OUT/replay.json holds."""

    out: str
    files: tuple[str, ...]
    table: str
    document: dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What a person asks of a replay.

    Attributes:
        strategies: names in ACQUISITIONS; those of loop/replay/controls.py are negative controls.
        start, batch: counted in `unit`.
        rounds: trainings of a strategy, the first included.
        seeds: 0 .. seeds - 1.
        measure: the split that models are measured on; "val" while a strategy is still being tuned.
        modality: only images of this one; "" = all.
        window: images are cut to at most this side, px; 0 = taken whole.
        full_seeds: trainings of full supervision.
    """

    strategies: tuple[str, ...]
    start: int = 8
    batch: int = 8
    rounds: int = 5
    seeds: int = 5
    unit: Unit = "images"
    measure: str = "test"
    modality: str = ""
    window: int = WINDOW
    full_seeds: int = 1


def simulate_folder(
    data: Path,
    out: Path,
    asked: Asked,
    *,
    config: Path | None = None,
    overrides: dict[str, Any] | None = None,
    workers: int | None = None,
    tell: Tell | None = None,
) -> SimulateReport:
    """Replays active learning on a dataset folder whose images are all labelled.

    Writes OUT/replay.json (design: strategies, curves, penalty matrix), OUT/table.md and plots. Rounds are kept in
    OUT/rounds, so a killed replay goes on where it was, and strategies or seeds can be added.

    Args:
        data: the folder, with the splits pool and `asked.measure` in its manifest.csv.
        out: made if missing.
        asked: what is replayed.
        config: settings; None = the default ones with `COMPACT` on top.
        overrides: dotted names to values on top of both.
        workers: processes; None = one a core.
        tell: called as tell("images" or "replay", done, total).

    Raises:
        InputError: the folder, or what was asked for, cannot be replayed; OUT holds a replay of other settings, or of
            other images.
        ConfigError: a strategy or a setting is unknown.
    """
    if not asked.strategies:
        raise InputError("no strategy to replay; name some, as --strategy random,foreground_random,celloop")
    if asked.seeds < 1 or asked.full_seeds < 1:
        raise InputError(f"{asked.seeds} seeds and {asked.full_seeds} full trainings; give at least 1 of each")
    check_strategies(asked.strategies)
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    settings = load_config(config, {**({} if config else COMPACT), **given})
    plan = _plan(settings, asked)
    _claim(out, data, asked.window)

    def cutting(done: int, total: int) -> None:
        if tell is not None:
            tell("images", done, total)

    def playing(done: int, total: int) -> None:
        if tell is not None:
            tell("replay", done, total)

    job = ReplayJob(
        data=cut(data, out / "windows", asked.window, cutting) if asked.window else data,
        plan=plan,
        strategies=asked.strategies,
        seeds=tuple(range(asked.seeds)),
        measure=asked.measure,
        modality=asked.modality,
        full_seeds=asked.full_seeds,
    )
    document = {
        **summarise(replay(job, out, workers=workers, tell=playing)),
        "settings": _settings(data, settings, asked),
    }
    return _written(out, document)


def _claim(out: Path, data: Path, window: int) -> None:
    """Notes in OUT/source which images are replayed there, by their hashes; refuses where rounds of others are kept."""
    parts = [
        (ref.image_id, ref.sha256, ref.split, ref.group, ref.modality, file_sha256(ref.label_path))
        for ref in open_folder(data).images
        if ref.label_path is not None
    ]
    mark = hashlib.sha256(json.dumps([window, sorted(parts)]).encode()).hexdigest()
    note = out / "source"
    if note.exists() and note.read_text(encoding="utf-8") != mark:
        if (out / "rounds").exists():
            raise InputError(
                f"{out} holds a replay of other images, or of windows of another size; choose another folder with "
                "--out, or empty it"
            )
        shutil.rmtree(out / "windows", ignore_errors=True)
    write_text(note, mark)


def _plan(settings: LoopConfig, asked: Asked) -> ReplayPlan:
    select = settings.select
    return ReplayPlan(
        model=settings.model,
        train=settings.train,
        instances=settings.instances,
        start=asked.start,
        batch=asked.batch,
        rounds=asked.rounds,
        cost=CostModel.prior(settings.effort),
        unit=asked.unit,
        measure=select.measure,
        embedding=select.embedding,
        passes=select.passes,
        n_passes=select.n_passes,
    )


def _settings(data: Path, settings: LoopConfig, asked: Asked) -> dict[str, Any]:
    """What a reader of the figures must know."""
    manifest = data / "manifest.csv"
    return {
        "asked": vars(asked) | {"strategies": list(asked.strategies)},
        "manifest": file_sha256(manifest) if manifest.exists() else "",
        **{part: getattr(settings, part).model_dump(mode="json") for part in ("model", "train", "instances", "select")},
    }


def _written(out: Path, document: dict[str, Any]) -> SimulateReport:
    text = table(document)
    for name, content in (("replay.json", json.dumps(document, indent=1)), ("table.md", text)):
        write_text(out / name, content)
    plots: Sequence[Path] = write_plots(document, out)
    files = ("replay.json", "table.md", *(path.name for path in plots))
    return SimulateReport(str(out), files, text, document)
