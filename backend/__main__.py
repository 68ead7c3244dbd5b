"""`python -m backend --host H --port P`: the backend as a process of its own, configured by the environment."""

import argparse
import logging
import os
import sys

import uvicorn

from backend.app import create_app
from backend.errors import redact_logs
from backend.settings import ENVIRONMENT, Settings, is_loopback
from loop.adapters.mlflow_registry import CLIENT_ENVIRONMENT
from loop.errors import ConfigError, LoopError

logger = logging.getLogger("backend")

SHUTDOWN_S = 5


def check_host(host: str, settings: Settings, *, no_password: bool) -> None:
    """Passes where only this machine can call, a password is asked for, or a person said that none is wanted.

    Raises:
        ConfigError: other machines could call, and nothing would ask them for a password.
    """
    if not settings.user and not no_password and not is_loopback(host):
        raise ConfigError(
            f"{host or 'every address'} is reachable from other machines and there is no password; set "
            "CELLOOP_BACKEND_USER and CELLOOP_BACKEND_PASSWORD, or bind 127.0.0.1, or give --no-password where a "
            "proxy of your own asks who calls"
        )


def main(arguments: list[str] | None = None) -> int:
    """Runs until it is stopped; returns the exit code (2: a setting is missing or wrong)."""
    parser = argparse.ArgumentParser(
        prog="python -m backend",
        description="Serves the champion of each project to Label Studio.",
        epilog=f"Environment: {', '.join(ENVIRONMENT)}.",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9090)
    parser.add_argument(
        "--no-password",
        action="store_true",
        help="start without a password on an address that other machines reach; only behind a proxy that asks for one",
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for name, value in CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        settings = Settings.from_environment(os.environ)
        redact_logs(settings.secrets())
        check_host(given.host, settings, no_password=given.no_password)
        app = create_app(settings)
    except LoopError as error:
        logger.error("%s", error)
        return error.exit_code
    uvicorn.run(
        app,
        host=given.host,
        port=given.port,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
