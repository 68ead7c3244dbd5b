import os
import socket
from collections.abc import Iterator

import pytest

from flows.local import ports
from flows.local.ports import choose_ports, free_port, holder, is_free
from flows.local.services import DEFAULT_PORTS
from loop.errors import ConfigError


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def all_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "is_free", lambda port: True)


def test_a_port_is_taken_while_somebody_listens(taken: int) -> None:
    assert not is_free(taken)
    assert is_free(free_port())
    assert f"pid {os.getpid()}" in holder(taken)


@pytest.mark.usefixtures("all_free")
def test_usual_ports_at_first_and_the_last_ones_later() -> None:
    assert choose_ports({}, {}) == DEFAULT_PORTS
    assert choose_ports({}, {"backend": 9191}) == {**DEFAULT_PORTS, "backend": 9191}
    assert choose_ports({"backend": 9292, "mlflow": None}, {"backend": 9191}) == {**DEFAULT_PORTS, "backend": 9292}


def test_a_taken_port_that_was_asked_for_is_named_with_its_holder(taken: int) -> None:
    with pytest.raises(ConfigError, match=rf"port {taken} for MLflow is taken by .*pid {os.getpid()}.*--mlflow-port"):
        choose_ports({"mlflow": taken}, {})


def test_one_port_for_two_services_is_refused() -> None:
    with pytest.raises(ConfigError, match="asked for by MLflow and backend"):
        choose_ports({"mlflow": 5999, "backend": 5999}, {})


def test_a_taken_port_that_nobody_asked_for_is_replaced(taken: int) -> None:
    chosen = choose_ports({}, dict.fromkeys(DEFAULT_PORTS, taken))
    assert taken not in chosen.values()
    assert len(set(chosen.values())) == len(DEFAULT_PORTS)


@pytest.mark.usefixtures("all_free")
def test_a_usual_port_that_another_service_was_given_is_not_used_twice() -> None:
    chosen = choose_ports({"mlflow": 8080}, {})
    assert chosen["mlflow"] == 8080
    assert chosen["label_studio"] != 8080
