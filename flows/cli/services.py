"""`celloop up`, `down`, `status`, `doctor`: the services on this machine."""

import os
import sys
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.cli.console import Document, console, emit, run, say
from flows.cli.options import JsonOption, WorkspaceOption
from flows.local.launch import run_here, start_in_background, stop
from flows.local.site import UpOptions
from flows.local.state import State
from flows.local.status import read_status
from flows.local.workspace import Workspace

PortOption = Annotated[int | None, typer.Option(min=1, max=65535, help="default: the last one, the usual one, or free")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for command in (up, down, status, doctor):
        app.command()(command)


def up(
    workspace: WorkspaceOption = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="return when all are well; `celloop down` stops them")
    ] = False,
    label_studio_port: PortOption = None,
    mlflow_port: PortOption = None,
    prefect_port: PortOption = None,
    backend_port: PortOption = None,
    label_studio_url: Annotated[str, typer.Option(help="use this Label Studio instead of starting one")] = "",
    label_studio_token: Annotated[
        str, typer.Option(help="its token", envvar="CELLOOP_LABEL_STUDIO_TOKEN", show_envvar=True, show_default=False)
    ] = "",
    json: JsonOption = False,
) -> None:
    """Start Label Studio, MLflow, Prefect and the backend, and stop them all on Ctrl-C."""
    place = Workspace(workspace)
    options = UpOptions(
        ports={
            "label_studio": label_studio_port,
            "mlflow": mlflow_port,
            "prefect": prefect_port,
            "backend": backend_port,
        },
        label_studio_url=label_studio_url,
        label_studio_token=label_studio_token if label_studio_url or not _from_environment(label_studio_token) else "",
    )

    def show(state: State) -> None:
        emit(_up_document(place, state), json=json, render=_render_up)
        if not detach and state.supervisor.pid == os.getpid():
            say("press Ctrl-C to stop everything")

    def work() -> None:
        if detach:
            show(start_in_background(place, options, say))
        else:
            run_here(place, options, say, show)

    run(work, json=json)


def down(workspace: WorkspaceOption = None, json: JsonOption = False) -> None:
    """Stop the services; everything they know stays in the workspace."""

    def work() -> None:
        place = Workspace(workspace)
        stopped = stop(place, say)
        text = "stopped" if stopped else f"nothing ran in {place.root}"
        emit({"workspace": str(place.root), "stopped": stopped}, json=json, render=lambda document: Text(text))

    run(work, json=json)


def status(workspace: WorkspaceOption = None, json: JsonOption = False) -> None:
    """Show each service with its address, process, health and memory."""

    def work() -> None:
        found = read_status(Workspace(workspace))
        emit(found.document(), json=json, render=_render_status)
        if not found.healthy:
            raise typer.Exit(1)

    run(work, json=json)


def doctor(
    workspace: WorkspaceOption = None,
    project: Annotated[str | None, typer.Option(help="default: the first project", show_default=False)] = None,
    mend: Annotated[
        bool, typer.Option("--mend", help="put right what can be put right, and say what was done")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check versions, ports, tokens, the queue, one image, one click; name each fault and its cure, or mend it."""
    from flows.local.doctor import Check, examine

    def told(check: Check) -> Check:
        colour = {"ok": "green", "mended": "bold green", "fault": "bold red", "skipped": "dim"}[check.outcome]
        line = Text.assemble((f"{check.outcome:>8}", colour), f"  {check.name}: {check.detail}")
        for done in check.mended:
            line.append(f"\n          {done}", style="green")
        if check.cure:
            line.append(f"\n          {check.cure}", style="yellow")
        console().print(line, soft_wrap=True)
        return check

    def work() -> None:
        checks = [told(check) for check in examine(Workspace(workspace), project, mend=mend)]
        faults = [check for check in checks if check.outcome == "fault"]
        mended = [done for check in checks for done in check.mended]
        document = {"healthy": not faults, "mended": mended, "checks": [check.document() for check in checks]}
        verdict = f"{len(faults)} of {len(checks)} checks found a fault" if faults else "no fault found"
        if mended:
            verdict = f"{len(mended)} faults mended; " + (verdict if faults else "none is left")
        elif faults and not mend:
            verdict += "; `celloop doctor --mend` puts right what can be"
        emit(document, json=json, render=lambda _: Text(verdict))
        if faults:
            raise typer.Exit(1)

    run(work, json=json)


def _from_environment(token: str) -> bool:
    """Whether the token came with the environment, where it says nothing about this command."""
    return token == os.environ.get("CELLOOP_LABEL_STUDIO_TOKEN")


def _up_document(workspace: Workspace, state: State) -> Document:
    credentials = workspace.credentials()
    managed = state.label_studio_managed
    return {
        "workspace": str(workspace.root),
        "pid": state.supervisor.pid,
        "label_studio": state.urls["label_studio"],
        "label_studio_email": credentials.label_studio_email if credentials and managed else "",
        "secrets_file": str(workspace.secrets_file),
        "mlflow": state.urls["mlflow"],
        "prefect": state.urls["prefect"],
        "backend": state.urls["backend"],
    }


def _render_up(document: Document) -> RenderableType:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for title, key in (("Label Studio", "label_studio"), ("MLflow", "mlflow"), ("Prefect", "prefect")):
        table.add_row(title, document[key])
    table.add_row("backend", document["backend"])
    if document["label_studio_email"]:
        table.add_row("log in as", document["label_studio_email"])
        table.add_row("password", _password(document))
    return table


def _password(document: Document) -> str:
    """The password where a person looks on; where the output goes to a file, only where it is kept."""
    credentials = Workspace(document["workspace"]).credentials()
    if credentials is not None and sys.stdout.isatty():
        return credentials.label_studio_password
    return f"in {document['secrets_file']} (label_studio_password)"


def _render_status(document: Document) -> RenderableType:
    if not document["running"]:
        return Text(f"nothing runs in {document['workspace']}; start the services with `celloop up`")
    table = Table("service", "address", "process", "health", "memory", box=None, padding=(0, 2, 0, 0))
    for service in document["services"]:
        memory = f"{service['memory_mb']:.0f} MB" if service["memory_mb"] is not None else ""
        colour = "green" if service["healthy"] else "bold red"
        pid = str(service["pid"] or "")
        table.add_row(service["title"], service["url"], pid, Text(service["detail"], style=colour), memory)
    about = f"{document['workspace']}, process {document['supervisor_pid']}, since {document['started_at']}"
    return Group(table, Text(about, style="dim"))
