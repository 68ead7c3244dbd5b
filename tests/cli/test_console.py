import errno
import json

import pytest
import typer

from flows.cli.console import run
from loop.errors import InputError, StateError


def test_an_error_is_its_text_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise InputError("given a file, expected a folder")

    with pytest.raises(typer.Exit) as stopped:
        run(work)
    assert stopped.value.exit_code == 2
    assert "given a file, expected a folder" in capsys.readouterr().err


def test_with_json_the_error_is_one_document_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise StateError("nothing runs")

    with pytest.raises(typer.Exit) as stopped:
        run(work, json=True)
    assert stopped.value.exit_code == 1
    assert json.loads(capsys.readouterr().out) == {"error": "nothing runs", "kind": "StateError"}


def test_a_full_disk_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(typer.Exit) as stopped:
        run(work)
    assert stopped.value.exit_code == 1
    assert "no space left" in capsys.readouterr().err


def test_another_system_error_is_not_hidden() -> None:
    def work() -> None:
        raise OSError(errno.EIO, "broken disk")

    with pytest.raises(OSError, match="broken disk"):
        run(work)
