"""Two processes on this machine train one model; run as a program, this file is what each of the two does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from loop.config import InstanceConfig, ModelConfig, TrainConfig
from loop.data.store import write_png
from loop.data.synthetic import draw_cells
from loop.errors import CheckpointError, ConfigError
from loop.training.distributed import Group, is_first_process, process_group
from loop.training.trainer import _progress, train
from loop.types import ImageRef, Sample

MODELS = {
    "dense": ModelConfig(base=4, depth=2),
    "sparse": ModelConfig(name="sparse_seu_net", base=4, depth=2, queries=12, width=8, objectness=True),
}
CONFIG = TrainConfig(max_steps=3, crop=32, batch=1, warmup_steps=2, device="cpu", precision="fp32")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")


def config(**changes):
    return TrainConfig(**{**CONFIG.model_dump(), **changes})


def silent(step, values):
    return None


def samples_in(directory):
    """Two images with cells and one without, so that a process may see a batch without any."""
    found = []
    for i in range(3):
        pixels, cells = draw_cells(np.random.default_rng(i), (48, 48), 4 if i else 0)
        path = directory / f"{i}.png"
        if not path.exists():
            write_png(pixels, path)
        found.append(Sample(ImageRef(f"{i}", path, "", 48, 48, 3), cells))
    return found


def tensors_of(trained):
    weights = {key: value.contiguous() for key, value in trained.net.state_dict().items()}
    return {**weights, "losses": torch.tensor(trained.losses)}


def train_several(out):
    """What both processes do: some trainings in one group, their weights into files; the second fails in the last."""
    samples, rank = samples_in(out), int(os.environ["RANK"])
    with process_group(torch.device("cpu")):
        for name, model in MODELS.items():
            for accumulate in (1, 2):
                trained = train(samples, model, config(accumulate=accumulate), log=silent)
                save_file(tensors_of(trained), out / f"{name}-{accumulate}-{rank}.safetensors")
        answers = iter([False, False, rank == 0] + [rank == 1] * 100)
        stopped = train(
            samples, MODELS["dense"], config(max_steps=50), log=silent, state_dir=out / "state",
            should_stop=lambda: next(answers),
        )  # fmt: skip
        save_file(tensors_of(stopped), out / f"stopped-{rank}.safetensors")
        timed = train(samples, MODELS["dense"], config(max_steps=None, minutes=0.005 * (1 + rank)), log=silent)
        save_file(tensors_of(timed), out / f"timed-{rank}.safetensors")
        told = []
        judged = train(
            samples, MODELS["dense"], config(max_steps=6, patience=1, validations=2), validation=samples[1:],
            log=lambda *args: told.append(args), instances=InstanceConfig(min_area=1, min_score=0),
        )  # fmt: skip
        save_file(tensors_of(judged), out / f"judged-{rank}.safetensors")
        (out / f"judged-{rank}.json").write_text(json.dumps([told, judged.validation]))
        (out / f"done-{rank}").touch()
        train(samples, MODELS["dense"], config(max_steps=10**6), log=silent, should_stop=failing_in_the_second)


def failing_in_the_second():
    if os.environ["RANK"] == "1":
        raise ValueError("one process fails")
    return False


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder that two processes left behind, and how the last training, in which one of them fails, ended."""
    out = tmp_path_factory.mktemp("two")
    samples_in(out)
    # the launcher's own warnings are not what is tested; one thread each, since two processes share the cores of one
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [*TORCHRUN, "--nproc-per-node", "2", __file__, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert (out / "done-0").exists(), done.stderr[-3000:]
    assert (out / "done-1").exists(), done.stderr[-3000:]
    return out, done


def both(out, name):
    return [load_file(out / f"{name}-{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_train_what_one_does_with_twice_as_many_batches(together, name, accumulate):
    out, _ = together
    first, second = both(out, f"{name}-{accumulate}")
    alone = tensors_of(train(samples_in(out), MODELS[name], config(accumulate=2 * accumulate), log=silent))
    assert set(first) == set(second) == set(alone)
    for key in alone:
        assert torch.equal(first[key], second[key]), key
        assert torch.allclose(first[key], alone[key], rtol=1e-3, atol=1e-4), key
    start = train(samples_in(out), MODELS[name], config(max_steps=1, learning_rate=1e-9), log=silent)
    moved = [not torch.allclose(alone[key], value, atol=1e-4) for key, value in start.net.state_dict().items()]
    assert np.mean(moved) > 0.5


@pytest.mark.parametrize("name", ["stopped", "timed", "judged"])
def test_all_end_at_the_same_step_with_the_same_weights(together, name):
    first, second = both(together[0], name)
    assert len(first["losses"]) >= 1
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_the_first_alone_is_asked_whether_to_stop_and_stores(together):
    out, _ = together
    assert len(both(out, "stopped")[0]["losses"]) == 3
    assert json.loads((out / "state" / "state.json").read_text())["steps"] == 3


def test_the_first_alone_logs_and_validates(together):
    told, figures = json.loads((together[0] / "judged-0.json").read_text())
    assert [step for step, values in told if "validation_ap" in values]
    assert 0 <= figures["ap"] <= 1
    assert json.loads((together[0] / "judged-1.json").read_text()) == [[], None]


def test_a_failure_in_one_process_ends_all(together):
    """Within the fixture's time limit, not in the half hour that a process waits for another."""
    done = together[1]
    assert done.returncode != 0
    assert "ValueError: one process fails" in done.stderr


def test_the_group_is_left_at_the_end_and_one_within_another_is_the_same(monkeypatch):
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, timeout: calls.append(backend))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: calls.append("destroyed"))
    monkeypatch.setattr(distributed, "is_initialized", lambda: "gloo" in calls)

    def fail():
        with process_group(torch.device("cpu")) as outer, process_group(torch.device("cpu")) as inner:
            assert outer == inner == Group(1, 2, torch.device("cpu"))
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert calls == ["gloo", "destroyed"]


def test_one_process_is_a_group_of_its_own(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(torch.device("cpu")) as group:
        assert group == Group(0, 1, torch.device("cpu"))
        value = torch.tensor(2.0)
        group.share([value])
        assert (group.agree(0.25), group.mean(value), group.is_first, is_first_process()) == (0.25, 2.0, True, True)


def test_an_environment_that_is_not_torchruns_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 is set without RANK"), process_group(torch.device("cpu")):
        pass


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="no GPU of its own, torch sees 1"), process_group(torch.device("cuda")):
        pass


def test_a_state_that_not_every_process_sees_is_refused():
    class Other(Group):
        def agree(self, value):
            return 7.0

    class Fresh:
        steps = 0

    with pytest.raises(CheckpointError, match="process 1 found a state of 0 steps, the first process one of 7"):
        _progress(None, Fresh(), Other(1, 2, torch.device("cpu")))


if __name__ == "__main__":
    train_several(Path(sys.argv[1]))
