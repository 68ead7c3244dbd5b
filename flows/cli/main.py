"""The command `celloop`."""

import logging
import os
from collections.abc import MutableMapping

import typer

from flows.cli import demo, folders, projects, review, services, simulate, weights

LOOPBACK = ("127.0.0.1", "localhost", "::1")

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
    spare_loopback(os.environ)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", level)
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    app()


def spare_loopback(environ: MutableMapping[str, str]) -> None:
    """Keeps a person's proxy out of the way to our own services: adds this machine to NO_PROXY and no_proxy.

    Both get all that either held, since programs differ in which they read; "*" stays as it is.
    """
    given = ",".join(environ.get(name, "") for name in ("NO_PROXY", "no_proxy"))
    hosts = list(dict.fromkeys([*filter(None, map(str.strip, given.split(","))), *LOOPBACK]))
    value = "*" if "*" in hosts else ",".join(hosts)
    environ["NO_PROXY"] = environ["no_proxy"] = value


for group in (services, projects, review, folders, simulate, weights, demo):
    group.register(app)
