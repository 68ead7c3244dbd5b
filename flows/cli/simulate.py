"""The command `celloop simulate`: strategies compared on labelled images. Heavy imports wait for it."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Group
from rich.markdown import Markdown
from rich.text import Text

from flows.cli.console import Document, emit, run
from flows.cli.options import ConfigOption, JsonOption
from flows.cli.progress import telling


def simulate(
    data: Annotated[Path, typer.Option("--data", help="Labelled dataset folder with the splits pool and test.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write into; a killed replay goes on there.")],
    strategy: Annotated[
        list[str], typer.Option("--strategy", help="names of loop/acquisition, as random,foreground_random,celloop")
    ],
    start: Annotated[int, typer.Option("--start", help="Labelled at first, at random.")] = 8,
    batch: Annotated[int, typer.Option("--batch", help="Labelled more each round.")] = 8,
    unit: Annotated[Literal["images", "cells"], typer.Option("--unit", help="What these two count.")] = "images",
    rounds: Annotated[int, typer.Option("--rounds", help="Trainings of a strategy, the first included.")] = 5,
    seeds: Annotated[int, typer.Option("--seeds", help="Each strategy is played so often.")] = 5,
    measure: Annotated[str, typer.Option("--measure", help="Split to measure on; val while tuning.")] = "test",
    modality: Annotated[str, typer.Option("--modality", help="Only images of this one.", show_default=False)] = "",
    window: Annotated[int, typer.Option("--window", help="Images are cut to this side, px; 0 = whole.")] = 256,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps a training.")] = None,
    full_seeds: Annotated[int, typer.Option("--full-seeds", help="Trainings on the whole pool.")] = 1,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes; default: one a core.")] = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Replays active learning on labelled images: what each strategy would have brought, and at what cost."""

    def work() -> None:
        from flows.simulate import Asked, simulate_folder

        names = tuple(dict.fromkeys(name.strip() for part in strategy for name in part.split(",") if name.strip()))
        asked = Asked(
            strategies=names,
            start=start,
            batch=batch,
            rounds=rounds,
            seeds=seeds,
            unit=unit,
            measure=measure,
            modality=modality,
            window=window,
            full_seeds=full_seeds,
        )
        with telling() as tell:
            report = simulate_folder(
                data, out, asked, config=config, overrides={"train.max_steps": steps}, workers=workers, tell=tell
            )
        emit({**report.document, "table": report.table, "files": list(report.files)}, json=json, render=_shown)

    run(work, json=json)


def _shown(document: Document) -> Group:
    return Group(Markdown(document["table"]), Text(f"written: {', '.join(document['files'])}"))


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(simulate)
