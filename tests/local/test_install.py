"""The set-up script, without a network: what it decides, and when it makes an environment anew."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"
CPU_REPORT = {"install": [{"metadata": {"name": name}} for name in ("torch", "sympy", "numpy")]}
GPU_REPORT = {
    "install": [{"metadata": {"name": name}} for name in ("torch", "nvidia-cudnn-cu13", "triton", "cuda_bindings")]
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REQUIREMENTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, working in a folder of its own; commands that it would run are written down instead."""
    module = load("install")
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/app.lock").write_text("# pins\nnumpy==2.2.6\nsetuptools==84.2.1\ntorch==2.13.0\n")
    (tmp_path / "requirements/labelstudio.lock").write_text("label-studio==1.23.2\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    commands: list[str] = []

    def run(self: Any, command: list[str], what: str, total: int = 0) -> None:
        commands.append(" ".join(command).replace(str(self.path), "VENV").replace(str(tmp_path), "ROOT"))
        if command[1:3] == ["-m", "venv"]:
            (self.path / "bin").mkdir()
            (self.path / "bin/python").touch()

    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module.Environment, "_run", run)
    monkeypatch.setattr(module.Environment, "_cuda_in", lambda self, pin: module.cuda_packages(CPU_REPORT))
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    module.commands = commands  # type: ignore[attr-defined]
    return module


def torch_commands(install: ModuleType) -> list[str]:
    return [command for command in install.commands if "torch" in command.split("install", 1)[-1]]


def test_only_cuda_packages_count_as_cuda() -> None:
    install = load("install")
    assert install.cuda_packages(CPU_REPORT) == []
    assert install.cuda_packages(GPU_REPORT) == ["cuda-bindings", "nvidia-cudnn-cu13", "triton"]


def test_an_environment_is_made_once(install: ModuleType, tmp_path: Path) -> None:
    assert install.main([]) == 0
    first = list(install.commands)
    assert any("install --progress-bar off --no-input pip==26.3 setuptools==84.2.1" in command for command in first)
    assert any("-r ROOT/requirements/labelstudio.lock" in command for command in first)
    assert any("--no-deps --no-build-isolation -e ROOT" in command for command in first)
    assert sum(command.endswith("pip check") or " check" in command for command in first) == 2
    install.main([])
    assert install.commands == first


def test_a_changed_lock_makes_its_environment_anew_and_no_other(install: ModuleType, tmp_path: Path) -> None:
    install.main([])
    (tmp_path / ".venv/old").touch()
    (tmp_path / ".venv-labelstudio/old").touch()
    (tmp_path / "requirements/app.lock").write_text("numpy==2.2.7\n")
    install.main([])
    assert not (tmp_path / ".venv/old").exists()
    assert (tmp_path / ".venv-labelstudio/old").exists()


def test_a_changed_project_is_only_installed_again(install: ModuleType, tmp_path: Path) -> None:
    install.main(["app"])
    install.commands.clear()
    (tmp_path / "pyproject.toml").write_text("[project.scripts]\n")
    install.main(["app"])
    assert len(install.commands) == 2
    assert "-e ROOT" in install.commands[0]


def test_a_half_finished_environment_is_made_anew(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Any, torch: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(install.Environment, "_fill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            install.main(["app"])
    (tmp_path / ".venv/half").touch()
    install.main(["app"])
    assert not (tmp_path / ".venv/half").exists()
    assert json.loads((tmp_path / ".venv/celloop-stamp.json").read_text())["environment"]


def test_an_environment_of_somebody_else_is_left_alone(install: ModuleType, tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/precious").touch()
    with pytest.raises(install.InstallError, match="was not made by `make`; move it away"):
        install.main(["app"])
    assert (tmp_path / ".venv/precious").exists()


def test_a_linked_environment_is_used_as_it_is(install: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".venv").symlink_to(tmp_path / "elsewhere")
    install.main(["app"])
    assert install.commands == []


def test_without_a_gpu_pip_is_used_where_it_brings_no_cuda(install: ModuleType) -> None:
    install.main(["app"])
    assert len(torch_commands(install)) == 1
    assert torch_commands(install)[0].endswith("-c ROOT/requirements/app.lock torch==2.13.0")


def test_without_a_gpu_uv_is_used_where_pip_would_bring_cuda(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install.Environment, "_cuda_in", lambda self, pin: install.cuda_packages(GPU_REPORT))
    install.main(["app"])
    assert torch_commands(install) == [
        "VENV/bin/uv pip install --python VENV/bin/python --no-deps --torch-backend=cpu torch==2.13.0"
    ]


@pytest.mark.parametrize("arguments", [["app", "--torch", "gpu"], ["app"]])
def test_with_a_gpu_pip_is_not_even_asked(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(install, "has_gpu", lambda: True)
    monkeypatch.setattr(install.Environment, "_cuda_in", lambda self, pin: pytest.fail("asked"))
    install.main(arguments)
    assert torch_commands(install)[0].endswith("torch==2.13.0")


def test_a_failed_command_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install = load("install")
    monkeypatch.setattr(install, "ROOT", tmp_path)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/app.lock").write_text("")
    environment = install.Environment("app")
    environment.path.mkdir()
    with pytest.raises(install.InstallError, match=r"installing failed \(exit code 7\)(?s:.*)no such package"):
        environment._run([sys.executable, "-c", "print('no such package'); raise SystemExit(7)"], "installing")


def test_a_long_command_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install = load("install")
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "REMIND_S", 0.5)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/app.lock").write_text("a==1\nb==2\n")
    environment = install.Environment("app")
    environment.path.mkdir()
    code = "import time; print('Collecting a', flush=True); time.sleep(2)"
    environment._run([sys.executable, "-c", code], "packages", 2)
    assert ", 1 of 2 packages found" in capsys.readouterr().out


def test_the_script_says_what_is_wrong_without_a_traceback() -> None:
    command = [sys.executable, str(REQUIREMENTS / "install.py"), "somewhere"]
    reply = subprocess.run(command, capture_output=True, text=True, check=False)
    assert reply.returncode == 1
    assert reply.stderr == "set-up: no environment is called somewhere; there are app, labelstudio\n"


def test_a_lock_holds_no_local_versions_no_cuda_and_not_ourselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REQUIREMENTS))
    lock = load("lock")
    names = [("torch", "2.13.0+cpu"), ("celloop", "0.1.0"), ("nvidia-cudnn-cu13", "9"), ("Django", "5.2.19")]
    report = {"install": [{"metadata": {"name": name, "version": version}} for name, version in names]}
    assert lock.locked("app", report).splitlines()[1:] == ["Django==5.2.19", "torch==2.13.0"]


@pytest.mark.parametrize("name", ["app", "labelstudio"])
def test_the_committed_locks_pin_everything_exactly(name: str) -> None:
    lines = (REQUIREMENTS / f"{name}.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(line.count("==") == 1 and "+" not in line and " " not in line and "/" not in line for line in pins)
    names = [line.partition("==")[0] for line in pins]
    assert names == sorted(names, key=str.lower)
    assert len(names) == len({name.lower() for name in names})
    assert not [line for line in pins if line.startswith(("nvidia", "cuda", "triton"))]
    wanted = {"app": {"torch==2.13.0", "prefect==3.8.8", "mlflow==3.17.2"}, "labelstudio": {"label-studio==1.23.2"}}
    assert wanted[name] <= set(pins)
