"""The command review: which labels to look at again."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from flows.cli.console import Document, emit, run
from flows.cli.options import JsonOption, ProjectOption, WorkspaceOption
from flows.cli.progress import telling

SHOWN = 20


def review(
    project: ProjectOption = None,
    folds: Annotated[int, typer.Option("--folds", min=2, help="Models that check each other's labels.")] = 3,
    workspace: WorkspaceOption = None,
    json: JsonOption = False,
) -> None:
    """Lists labels that models which never saw them disagree with, here and in Label Studio's tab Review.

    Trains --folds models with a share of the training budget each; no label is changed.
    """

    def work() -> None:
        from flows.context import only_project, open_context
        from flows.local.workspace import Workspace
        from flows.review import review

        place = Workspace(workspace)
        context = open_context(place, only_project(place, project))
        with telling() as tell:
            report = review(context, folds=folds, tell=tell)
        url = f"{context.endpoints.label_studio_url}/projects/{context.project.ls_project_id}/data"
        emit({**asdict(report), "url": url}, json=json, render=_listed)

    run(work, json=json)


def register(app: typer.Typer) -> None:
    """Adds the command of this module to `app`."""
    app.command("review")(review)


def _listed(document: Document) -> Group:
    listed = document["listed"]
    whole = f"{document['images']} labelled images ({document['cells']} cells)"
    said = f"{len(listed)} of {whole} are worth a second look" if listed else f"nothing suspicious in {whole}"
    lines = [f"left out: {line}" for line in document["left_out"]]
    table = Table(box=None)
    for name in ("rank", "image", "score", "why"):
        table.add_column(name, justify="right" if name in ("rank", "score") else "left")
    for entry in listed[:SHOWN]:
        table.add_row(str(entry["rank"]), entry["image_id"], f"{entry['score']:.2f}", entry["reason"])
    if listed:
        more = f"{len(listed) - SHOWN} more, and " if len(listed) > SHOWN else ""
        lines.append(f"{more}all of them in order in Label Studio's tab Review: {document['url']}")
    return Group(Text(said), *([table] if listed else []), *map(Text, lines))
