"""Commands on a project: init, round, rollback, report, export.

What they do is imported when they do it: torch, Prefect and MLflow take seconds to load, `celloop --help` must not.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flows.cli.console import Document, emit, run
from flows.cli.options import ConfigOption, JsonOption, ProjectOption, WorkspaceOption
from flows.cli.progress import telling
from loop.errors import InputError


def init(
    images: Annotated[Path, typer.Option("--images", help="Folder of images (images/, optional manifest.csv).")],
    name: Annotated[str | None, typer.Option("--name", help="Project name; none = the folder's name.")] = None,
    config: ConfigOption = None,
    label_config: Annotated[Path | None, typer.Option("--label-config", help="A label config of your own.")] = None,
    workspace: WorkspaceOption = None,
    json: JsonOption = False,
) -> None:
    """Makes a project of a folder: tasks, backend, schedules, and the first batch in random order.

    Run again it adds the folder's new images; settings and label config stay unless they are given.
    """

    def work() -> None:
        from flows.context import open_context
        from flows.deploy import deploy
        from flows.local.workspace import Workspace
        from flows.round import run_round
        from flows.start import start_project
        from loop.config import load_config

        place = Workspace(workspace)
        xml = _read_text(label_config) if label_config else None
        project = name or _slug(images)
        with telling() as tell:
            settings = load_config(config) if config else None
            started = start_project(place, images, project, settings, label_config_xml=xml, tell=tell)
            context = open_context(place, project)
            deploy(context)
            first = run_round(context, tell)
        url = f"{context.endpoints.label_studio_url}/projects/{started.label_studio_project}/data"
        document = {**asdict(started), "published": first.published, "url": url}
        emit(document, json=json, render=_started)

    run(work, json=json)


def round_(project: ProjectOption = None, workspace: WorkspaceOption = None, json: JsonOption = False) -> None:
    """One round now: sync, snapshot, pseudo-labels, train, gate, predict, select, publish, report."""

    def work() -> None:
        from flows.context import only_project, open_context
        from flows.local.workspace import Workspace
        from flows.round import run_round

        place = Workspace(workspace)
        with telling() as tell:
            report = run_round(open_context(place, only_project(place, project)), tell)
        emit(asdict(report), json=json, render=_round)

    run(work, json=json)


def rollback(
    project: ProjectOption = None,
    reason: Annotated[str, typer.Option("--reason", help="Kept with the model.")] = "by hand",
    workspace: WorkspaceOption = None,
    json: JsonOption = False,
) -> None:
    """Puts the champion before this one back into service; the backend follows within seconds."""

    def work() -> None:
        from flows.context import only_project, open_context
        from flows.local.workspace import Workspace

        place = Workspace(workspace)
        context = open_context(place, only_project(place, project))
        before = context.registry.champion()
        now = context.registry.rollback(reason)
        document = {
            "project": context.project_name,
            "from": before.label if before else None,
            "to": now.label,
            "reason": reason,
            "next": "the next round publishes its predictions",
        }
        emit(document, json=json, render=_table)

    run(work, json=json)


def report(project: ProjectOption = None, workspace: WorkspaceOption = None, json: JsonOption = False) -> None:
    """Writes the project's page: what was learnt, what it cost, what to do next."""

    def work() -> None:
        from flows.context import only_project, open_context
        from flows.local.workspace import Workspace
        from flows.report import write_report
        from flows.sync import sync

        place = Workspace(workspace)
        context = open_context(place, only_project(place, project))
        sync(context)
        emit({"report": str(write_report(context))}, json=json, render=_table)

    run(work, json=json)


def export_(
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")],
    formats: Annotated[
        str, typer.Option("--format", help="some of coco,labels,layers,cellpose,geojson")
    ] = "coco,labels",
    project: ProjectOption = None,
    workspace: WorkspaceOption = None,
    json: JsonOption = False,
) -> None:
    """Writes the masks that people submitted in the formats that other tools read."""

    def work() -> None:
        from flows.context import only_project, open_context
        from flows.export import export
        from flows.local.workspace import Workspace

        place = Workspace(workspace)
        context = open_context(place, only_project(place, project))
        done = export(context, out, [part.strip() for part in formats.split(",") if part.strip()])
        emit(asdict(done), json=json, render=_table)

    run(work, json=json)


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to `app`."""
    app.command("init")(init)
    app.command("round")(round_)
    app.command("rollback")(rollback)
    app.command("report")(report)
    app.command("export")(export_)


def _slug(images: Path) -> str:
    letters = [c if c.isascii() and c.isalnum() else "-" for c in images.resolve().name.lower()]
    return "-".join(part for part in "".join(letters).split("-") if part)[:40].strip("-")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the label config {path}: {error.strerror}; give an XML file") from error


def _started(document: Document) -> Table:
    shown = {key: value for key, value in document.items() if key != "problems"}
    table = _table(shown)
    for problem in document["problems"]:
        table.add_row("note", str(problem))
    return table


def _round(document: Document) -> Table:
    """What a round did; of its pseudo-labels, whether they teach, why, and what they changed."""
    pseudo = document["pseudo"]
    told = [pseudo["reason"]]
    if "mixed_ap" in pseudo:
        share = pseudo.get("labelled_share", 1.0)
        biased = f" (which had {share:.0%} of the training)" if share < 1 else ""
        told.append(f"AP {pseudo['mixed_ap']:.3f} with them, {pseudo['labelled_ap']:.3f} without{biased}")
    told += [f"{name}: {found['reason']}" for name, found in pseudo.get("audits", {}).items()]
    told += [f"{name} is left out: {reason}" for name, reason in pseudo.get("missing", {}).items()]
    shown = {key: value for key, value in document.items() if key != "pseudo"}
    return _table({**shown, "pseudo-labels": told})


def _table(document: Document) -> Table:
    table = Table(show_header=False, box=None)
    for key, value in document.items():
        if value in ("", (), [], None, {}):
            continue
        table.add_row(key.replace("_", " "), _text(value))
    return table


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items() if not isinstance(v, dict))
    if isinstance(value, list | tuple):
        return "\n".join(str(item) for item in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)
