"""What every command shares: one JSON document or something to read, and errors without tracebacks."""

import errno
import json as json_module
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import typer
from rich.console import Console, RenderableType

from loop.errors import LoopError

Document = dict[str, Any]


@cache
def console() -> Console:
    """Where progress and errors go: standard error."""
    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line for people; never markup, so that paths with brackets stay whole."""
    console().print(text, markup=False, soft_wrap=True)


def emit(document: Document, *, json: bool, render: Callable[[Document], RenderableType]) -> None:
    """Writes a command's result to standard output.

    Args:
        document: the result, as JSON-ready values.
        json: True: exactly this document, as JSON, on one line. False: what `render` makes of it.
        render: the document as something that rich can print.
    """
    if json:
        sys.stdout.write(json_module.dumps(document, default=str) + "\n")
        sys.stdout.flush()
    else:
        Console(highlight=False).print(render(document))


def run(work: Callable[[], None], *, json: bool = False) -> None:
    """Calls `work`; a LoopError becomes its text and exit code, without a traceback.

    Args:
        work: the command's body.
        json: True: the error goes to standard output as {"error": text, "kind": class name}.

    Raises:
        typer.Exit: the command failed; 2 for bad usage or input, 1 for everything else, 130 after Ctrl-C.
    """
    try:
        work()
    except LoopError as error:
        _refuse(str(error), type(error).__name__, json)
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        text = (
            f"no space left on the disk of {error.filename or 'the workspace'}; free some, then run the same command "
            "again: what was finished is kept, what was half written is made again"
        )
        _refuse(text, "DiskFull", json)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        say("interrupted")
        raise typer.Exit(130) from error


def _refuse(text: str, kind: str, json: bool) -> None:
    if json:
        sys.stdout.write(json_module.dumps({"error": text, "kind": kind}) + "\n")
        sys.stdout.flush()
    else:
        console().print("error: ", style="bold red", end="")
        say(text)
