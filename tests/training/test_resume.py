import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from loop.config import InstanceConfig, ModelConfig, TrainConfig
from loop.data.store import write_png
from loop.data.synthetic import draw_cells
from loop.errors import CheckpointError
from loop.training import trainer
from loop.training.state import DESCRIPTION
from loop.training.trainer import train
from loop.types import ImageRef, Sample

DENSE = ModelConfig(base=4, depth=2)
SPARSE = ModelConfig(name="sparse_seu_net", base=4, depth=2, queries=12, width=8, overlap=False, objectness=True)
TWELVE = TrainConfig(max_steps=12, crop=32, batch=2, accumulate=2, ema=0.9, warmup_steps=3, device="cpu")


class Killed(BaseException):
    """Stands for a process that dies."""


def silent(step, values):
    return None


def samples_in(directory, n=3):
    found = []
    for i in range(n):
        pixels, cells = draw_cells(np.random.default_rng(i), (64, 64), 5)
        path = directory / f"{i}.png"
        write_png(pixels, path)
        found.append(Sample(ImageRef(f"{i}", path, f"hash {i}", 64, 64, 3), cells))
    return found


@pytest.fixture
def samples(tmp_path):
    return samples_in(tmp_path)


@pytest.fixture
def always_store(monkeypatch):
    monkeypatch.setattr(trainer, "STORE_EVERY_S", 0.0)


def dying_at(step):
    def should_stop():
        should_stop.asked += 1
        if should_stop.asked == step:
            raise Killed
        return False

    should_stop.asked = 0
    return should_stop


def assert_same(one, two):
    assert one.losses == two.losses
    assert one.steps == two.steps
    for left, right in zip(one.net.parameters(), two.net.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("model", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_a_training_killed_twice_gives_what_an_unbroken_one_gives(samples, tmp_path, always_store, model):
    unbroken = train(samples, model, TWELVE, log=silent)
    for step in (4, 5):
        with pytest.raises(Killed):
            train(samples, model, TWELVE, log=silent, state_dir=tmp_path / "s", should_stop=dying_at(step))
    told = []
    resumed = train(samples, model, TWELVE, log=lambda *args: told.append(args), state_dir=tmp_path / "s")
    assert_same(resumed, unbroken)
    assert resumed.seconds > 0
    assert [step for step, _ in told] == [10, 12]
    assert told[-1][1]["loss"] == pytest.approx(np.mean(unbroken.losses[10:]))


def test_a_training_that_was_stopped_goes_on_and_one_that_has_ended_stays_so(samples, tmp_path):
    unbroken = train(samples, DENSE, TWELVE, log=silent)
    answers = iter([False, False, True])
    stopped = train(
        samples, DENSE, TWELVE, log=silent, state_dir=tmp_path / "s", should_stop=lambda: next(answers)
    )  # fmt: skip
    assert stopped.steps == 3
    for _ in range(2):
        assert_same(train(samples, DENSE, TWELVE, log=silent, state_dir=tmp_path / "s"), unbroken)


def test_a_real_kill(samples, tmp_path):
    unbroken = train(samples, DENSE, TWELVE, log=silent)
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_resume import *\n"
        "trainer.STORE_EVERY_S = 0.0\n"
        "calls = []\n"
        "def slow():\n"
        "    calls.append(1)\n"
        "    time.sleep(60 if len(calls) == 6 else 0)\n"
        "train(samples_in(Path(sys.argv[2])), DENSE, TWELVE, log=silent, state_dir=Path(sys.argv[2]) / 's', "
        "should_stop=slow)\n"
    )
    here = str(Path(__file__).parent)
    child = subprocess.Popen([sys.executable, "-c", code, here, str(tmp_path)], env={**os.environ})
    stored, deadline = tmp_path / "s" / DESCRIPTION, time.monotonic() + 120
    while not (stored.exists() and json.loads(stored.read_text())["steps"] == 6):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert_same(train(samples, DENSE, TWELVE, log=silent, state_dir=tmp_path / "s"), unbroken)


def test_minutes_that_were_spent_are_not_spent_again(samples, tmp_path):
    config = TrainConfig(**{**TWELVE.model_dump(), "max_steps": None, "minutes": 1.0})

    def run(should_stop=None):
        ticks = iter(range(0, 10**6, 4))
        clock = lambda: float(next(ticks))  # noqa: E731
        return train(samples, DENSE, config, log=silent, state_dir=tmp_path / "s", clock=clock, should_stop=should_stop)

    answers = iter([False, False, True])
    first = run(lambda: next(answers))
    assert first.seconds < 60
    second = run()
    assert 60 <= second.seconds < 80
    assert second.steps < 2 * first.steps + 60 / 4
    assert run().steps == second.steps


def test_what_the_validations_found_survives(samples, tmp_path, always_store, monkeypatch):
    config = TrainConfig(**{**TWELVE.model_dump(), "validations": 5, "patience": 2})
    sequence = [0.3, 0.6, 0.5, 0.4, 0.9]

    def run(**options):
        return train(samples[1:], DENSE, config, log=silent, validation=samples[:1], **options)

    aps = iter(sequence)
    monkeypatch.setattr("loop.training.validation.Validation.ap", lambda self, net: next(aps))
    unbroken = run()
    aps = iter(sequence)
    with pytest.raises(Killed):
        run(state_dir=tmp_path / "s", should_stop=dying_at(7))
    stored = json.loads((tmp_path / "s" / DESCRIPTION).read_text())
    assert (stored["validated"], stored["best_ap"], stored["worse"]) == (3, 0.6, 1)
    resumed = run(state_dir=tmp_path / "s")
    assert resumed.steps == 9
    assert_same(resumed, unbroken)


def test_the_state_of_another_training_is_refused(samples, tmp_path):
    def run(given=samples, model=DENSE, **options):
        changes = {name: options.pop(name) for name in ("max_steps", "learning_rate") if name in options}
        config = TrainConfig(**{**TWELVE.model_dump(), "max_steps": 2, **changes})
        return train(given, model, config, log=silent, state_dir=tmp_path / "s", **options)

    run()
    moved = samples[0].instances.take(range(4))
    fewer = [Sample(samples[0].image, moved), *samples[1:]]
    for options in (
        {"max_steps": 3},
        {"learning_rate": 1e-4},
        {"model": SPARSE},
        {"given": samples[:2]},
        {"given": samples[::-1]},
        {"given": fewer},
        {"validation": samples[:1]},
        {"instances": InstanceConfig(seed=0.3)},
    ):
        with pytest.raises(CheckpointError, match=r"other images or with other settings; .* delete .*s to start anew"):
            run(**options)
    assert run().steps == 2


@pytest.mark.parametrize("name", ["json", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_state_is_refused_with_what_to_do(samples, tmp_path, name, share):
    config = TrainConfig(**{**TWELVE.model_dump(), "max_steps": 2})
    train(samples, DENSE, config, log=silent, state_dir=tmp_path / "s")
    (path,) = (tmp_path / "s").glob(f"*.{name}")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"is damaged .* delete .*s to start anew"):
        train(samples, DENSE, config, log=silent, state_dir=tmp_path / "s")


@pytest.mark.parametrize("broken", ["tensors", "losses", "steps", "recipe"])
def test_a_state_that_lacks_something_is_refused(samples, tmp_path, broken):
    config = TrainConfig(**{**TWELVE.model_dump(), "max_steps": 2})
    train(samples, DENSE, config, log=silent, state_dir=tmp_path / "s")
    path = tmp_path / "s" / DESCRIPTION
    found = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in found.items() if key != broken}))
    with pytest.raises(CheckpointError, match="is damaged"):
        train(samples, DENSE, config, log=silent, state_dir=tmp_path / "s")


def test_a_kill_between_tensors_and_description_leaves_the_state_before(samples, tmp_path, always_store, monkeypatch):
    unbroken = train(samples, DENSE, TWELVE, log=silent)

    def dying_write(path, text, **options):
        if path.name.startswith(DESCRIPTION) and json.loads(text)["steps"] == 5:
            raise Killed
        path.write_bytes(text.encode())

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", dying_write)
        with pytest.raises(Killed):
            train(samples, DENSE, TWELVE, log=silent, state_dir=tmp_path / "s")
    names = {path.name for path in (tmp_path / "s").iterdir()}
    assert {"4-state.safetensors", "5-state.safetensors"} <= names
    assert json.loads((tmp_path / "s" / DESCRIPTION).read_text())["steps"] == 4
    assert_same(train(samples, DENSE, TWELVE, log=silent, state_dir=tmp_path / "s"), unbroken)
    assert {path.name for path in (tmp_path / "s").iterdir()} == {DESCRIPTION, "12-state.safetensors"}


def test_a_folder_that_cannot_be_written_is_refused(samples, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the training's state"):
        train(samples, DENSE, TWELVE, log=silent, state_dir=tmp_path / "file" / "s")
