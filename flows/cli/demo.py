"""`celloop demo`: the whole loop on the sample images, then Label Studio left open for a person to look at."""

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table

from flows.cli.console import Document, emit, run, say
from flows.cli.options import ConfigOption, JsonOption, WorkspaceOption
from flows.cli.progress import telling

SETTINGS = Path(__file__).parents[2] / "configs" / "demo.yaml"


def demo(
    workspace: WorkspaceOption = None,
    config: ConfigOption = None,
    example: Annotated[
        Path | None, typer.Option("--example", help="sample images with labels/", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    """Starts everything, labels 12 + 8 sample images as a person would, retrains twice, and shows where to look.

    On a terminal the services stay up for you; elsewhere, or with CELLOOP_DEMO_EXIT=1, they are stopped at the end.
    Services that ran before are never stopped.
    """

    def work() -> None:
        from flows.demo import EXAMPLE, run_demo
        from flows.local.launch import start_in_background, stop
        from flows.local.site import UpOptions
        from flows.local.workspace import Workspace
        from loop.config import load_config

        started = time.monotonic()
        place = Workspace(workspace)
        before = place.state()
        ran_before = before is not None and before.is_running()
        stay = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("CELLOOP_DEMO_EXIT") != "1"
        finished = False
        try:
            start_in_background(place, UpOptions(), say)
            with telling() as tell:
                result = run_demo(place, load_config(config or SETTINGS), tell, example or EXAMPLE)
            endpoints = place.endpoints()
            document = {
                **asdict(result),
                "minutes": (time.monotonic() - started) / 60,
                "label_studio": f"{endpoints.label_studio_url}/projects/{result.label_studio_project}/data",
                "email": endpoints.label_studio_email,
                "mlflow": endpoints.mlflow_url,
                "prefect": endpoints.prefect_api_url.removesuffix("/api"),
                "stays": stay or ran_before,
            }
            if stay and not json:
                document["password"] = endpoints.label_studio_password
            emit(document, json=json, render=_render)
            finished = True
        finally:
            if not ran_before and not (stay and finished):
                stop(place, say)

    run(work, json=json)


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command("demo")(demo)


def _render(document: Document) -> Group:
    rounds = Table(title="The loop, twice round")
    for heading in (
        "round",
        "images labelled",
        "cells labelled",
        "hold-out images",
        "AP",
        "AP50",
        "AP of champion before",
        "AP with pseudo-labels",
        "AP without",
    ):
        rounds.add_column(heading, justify="right")
    rounds.add_column("decision")
    for line in document["rounds"]:
        before = line["champion_ap"]
        rounds.add_row(
            str(line["round"]),
            str(line["images_labelled"]),
            str(line["cells_labelled"]),
            str(line["hold_out_images"]),
            f"{line['ap']:.3f}",
            f"{line['ap50']:.3f}",
            *("-" if ap is None else f"{ap:.3f}" for ap in (before, line["mixed_ap"], line["labelled_ap"])),
            line["decision"],
        )
    where = Table(show_header=False, box=None)
    for line in document["rounds"]:
        where.add_row(f"round {line['round']}", line["reason"])
        if line["pseudo"]:
            where.add_row("pseudo-labels", line["pseudo"])
    where.add_row("next in the queue", ", ".join(document["next_images"]))
    where.add_row("report", document["report"])
    where.add_row("took", f"{document['minutes']:.1f} minutes")
    if document["stays"]:
        where.add_row("Label Studio", document["label_studio"])
        if "password" in document:
            where.add_row("log in as", f"{document['email']}  password  {document['password']}")
        where.add_row("MLflow", document["mlflow"])
        where.add_row("Prefect", document["prefect"])
        where.add_row("stop", "celloop down   (all state is in the workspace; delete it for a clean start)")
    return Group(rounds, where)
