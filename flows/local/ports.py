"""Which port each service gets: the one asked for, else its last one, else its usual one, else a free one."""

import socket
from collections.abc import Mapping

import psutil

from flows.local.services import DEFAULT_PORTS, LOOPBACK, TITLES
from loop.errors import ConfigError


def is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def holder(port: int) -> str:
    """Which process listens on `port`, as "NAME (pid N)"; "another program" where the system does not say."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return "another program"
    return "another program"


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def choose_ports(given: Mapping[str, int | None], last: Mapping[str, int]) -> dict[str, int]:
    """A port for every service of DEFAULT_PORTS, no two alike.

    Args:
        given: what a person asked for; None = not asked.
        last: what the services had before: Label Studio's projects remember the backend by its port.

    Raises:
        ConfigError: a port that was asked for is taken or asked for twice.
    """
    asked = {name: port for name, port in given.items() if port is not None}
    for name, port in asked.items():
        twins = [TITLES[other] for other, value in asked.items() if value == port]
        if len(twins) > 1:
            raise ConfigError(f"port {port} is asked for by {' and '.join(twins)}; give each its own")
        if not is_free(port):
            option = f"--{name.replace('_', '-')}-port"
            raise ConfigError(
                f"port {port} for {TITLES[name]} is taken by {holder(port)}; "
                f"stop it, give another {option}, or leave the option out for a free port"
            )
    chosen = dict(asked)
    for name, usual in DEFAULT_PORTS.items():
        wishes = (last.get(name, usual), usual)
        if name not in chosen:
            fitting = [port for port in wishes if port not in chosen.values() and is_free(port)]
            chosen[name] = fitting[0] if fitting else _another(chosen)
    return chosen


def _another(chosen: Mapping[str, int]) -> int:
    while (port := free_port()) in chosen.values():
        continue
    return port
