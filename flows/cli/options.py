"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

WorkspaceOption = Annotated[
    Path | None, typer.Option("--workspace", help="folder that holds all state; default: .celloop", show_default=False)
]
ProjectOption = Annotated[
    str | None, typer.Option("--project", help="project name; default: the only one", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="settings, as configs/loop.yaml", show_default=False)
]
