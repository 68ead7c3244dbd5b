import json
from pathlib import Path

import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

from flows.cli import services
from flows.cli.console import emit, run
from loop.errors import ConfigError, ServiceError


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    services.register(made)
    return made


def test_the_four_commands_are_there(app: typer.Typer) -> None:
    reply = CliRunner().invoke(app, ["--help"])
    for command in ("up", "down", "status", "doctor"):
        assert command in reply.stdout


@pytest.mark.parametrize("as_json", [True, False])
def test_status_of_nothing(app: typer.Typer, tmp_path: Path, as_json: bool) -> None:
    reply = CliRunner().invoke(app, ["status", "--workspace", str(tmp_path), *(["--json"] if as_json else [])])
    assert reply.exit_code == 0
    if as_json:
        assert json.loads(reply.stdout)["running"] is False
    else:
        assert "celloop up" in reply.stdout


def test_down_of_nothing(app: typer.Typer, tmp_path: Path) -> None:
    reply = CliRunner().invoke(app, ["down", "--workspace", str(tmp_path), "--json"])
    assert reply.exit_code == 0
    assert json.loads(reply.stdout) == {"workspace": str(tmp_path), "stopped": False}


def test_bad_usage_exits_with_2_and_one_document(app: typer.Typer, tmp_path: Path) -> None:
    command = ["up", "--workspace", str(tmp_path / "ws"), "--label-studio-url", "http://host", "--json"]
    reply = CliRunner().invoke(app, command)
    assert reply.exit_code == 2
    document = json.loads(reply.stdout)
    assert document["kind"] == "ConfigError"
    assert "--label-studio-token" in document["error"]


def test_a_token_from_the_environment_alone_changes_nothing(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELLOOP_LABEL_STUDIO_TOKEN", "t" * 40)
    monkeypatch.setenv("CELLOOP_LABEL_STUDIO_BIN", str(tmp_path / "missing"))
    reply = CliRunner().invoke(app, ["up", "--workspace", str(tmp_path / "ws"), "--json"])
    assert reply.exit_code == 1
    assert "Label Studio is not installed" in json.loads(reply.stdout)["error"]


@pytest.mark.parametrize(("error", "code"), [(ConfigError("a; b"), 2), (ServiceError("c [d]; e"), 1)])
def test_errors_are_texts_without_tracebacks(capsys: pytest.CaptureFixture[str], error: Exception, code: int) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        run(fail)
    assert ended.value.exit_code == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {error}\n")
    with pytest.raises(typer.Exit):
        run(fail, json=True)
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ({"error": str(error), "kind": type(error).__name__}, "")


def test_other_errors_are_not_hidden() -> None:
    def fail() -> None:
        raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError, match="a fault of the program"):
        run(fail)


def test_ctrl_c_is_not_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as ended:
        run(interrupt)
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_emit_writes_one_document_or_something_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"a": Path("/b")}, json=True, render=lambda _: Text("unused"))
    assert capsys.readouterr().out == '{"a": "/b"}\n'
    emit({"a": 1}, json=False, render=lambda document: Text(f"a is {document['a']}"))
    assert capsys.readouterr().out == "a is 1\n"
