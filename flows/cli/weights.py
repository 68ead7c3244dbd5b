"""`celloop weights`: published weights of other people's networks, listed and downloaded."""

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from flows.cli.console import Document, emit, run
from flows.cli.options import JsonOption
from flows.cli.progress import telling

MEGABYTE = 1_000_000


def weights(
    name: Annotated[str | None, typer.Argument(help="file to download; without it the files are listed")] = None,
    json: JsonOption = False,
) -> None:
    """Lists published weights (Segment Anything), or downloads one and checks it; goes on where it broke off."""

    def work() -> None:
        from loop.data.weights import PUBLISHED, fetch_weights, models_folder

        if name is None:
            folder = models_folder()
            files = [
                {
                    "name": n,
                    "megabytes": p.size // MEGABYTE,
                    "url": p.url,
                    "sha256": p.sha256,
                    "here": (folder / n).exists(),
                }
                for n, p in PUBLISHED.items()
            ]
            emit({"folder": str(folder), "files": files}, json=json, render=_listed)
            return
        with telling() as tell:

            def told(done: int, total: int) -> None:
                tell("megabytes", done // MEGABYTE, total // MEGABYTE)

            path = fetch_weights(name, progress=told)
        emit({"path": str(path)}, json=json, render=lambda document: Text(document["path"]))

    run(work, json=json)


def register(app: typer.Typer) -> None:
    """Adds the command of this module to `app`."""
    app.command("weights")(weights)


def _listed(document: Document) -> Table:
    table = Table("file", "MB", "here", caption=f"in {document['folder']}")
    for file in document["files"]:
        table.add_row(file["name"], str(file["megabytes"]), "yes" if file["here"] else "no")
    return table
