"""The command `celloop`."""

import logging
import os

import typer

from flows.cli import demo, folders, projects, services

app = typer.Typer(
    name="celloop",
    help="An active-learning, semi-supervised labelling loop for cell images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs the command line; logs of our own go to standard error from WARNING on, all with CELLOOP_LOG=INFO."""
    level = os.environ.get("CELLOOP_LOG", "WARNING").upper()
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", force=True)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", level)
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    app()


for group in (services, projects, folders, demo):
    group.register(app)
