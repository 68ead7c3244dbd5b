"""A replay's rounds as jobs in several processes; each is kept on disk, so that a killed replay goes on."""

import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from loop.data.text_file import write_text
from loop.errors import InputError
from loop.replay.engine import Bench, Labelled, Played, ReplayPlan, begin, check_strategies, fit, play
from loop.replay.pool import open_replay

Tell = Callable[[int, int], None]

FULL = "full"


@dataclass(frozen=True)
class ReplayJob:
    """What is replayed.

    Attributes:
        data: the dataset folder.
        plan: how.
        strategies: names in ACQUISITIONS or CONTROLS.
        seeds: each strategy is played once a seed.
        measure: the split that models are measured on.
        modality: only images of this one, "" = all.
        full_seeds: how many models of full supervision the others are compared with; their figures are averaged.
    """

    data: Path
    plan: ReplayPlan
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    measure: str = "test"
    modality: str = ""
    full_seeds: int = 1

    @property
    def identity(self) -> str:
        """Hash of all that a kept round depends on; strategies and seeds may be added later."""
        plan = {
            name: value.model_dump(mode="json") if hasattr(value, "model_dump") else value
            for name, value in vars(self.plan).items()
            if name not in ("cost", "rounds")
        }
        parts = {"plan": plan, "cost": asdict(self.plan.cost), "measure": self.measure, "modality": self.modality}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class _Task(NamedTuple):
    """One training: of full supervision, or of a round for some strategies."""

    seed: int
    number: int
    strategies: tuple[str, ...]
    labelled: Labelled | None


def replay(job: ReplayJob, out: Path, *, workers: int | None = None, tell: Tell | None = None) -> dict[str, Any]:
    """Plays every strategy with every seed; returns what `loop.replay.summary` works with.

    Strategies, seeds and rounds may be added to what OUT holds. For more rounds, what had been the last one is trained
    again: nobody had asked its model what to label next.

    Args:
        job: what.
        out: rounds are kept in OUT/rounds; those that are there are not played again.
        workers: processes, a thread each; None = one a core (with a GPU at most four, which share it).
        tell: called as tell(done, total), a training each.

    Returns:
        {"full": figures, "strategies": {name: {"seeds": [{"seed", "images", "cells", "corrections", "seconds",
        "foreground", "chosen", and each of the model's figures}]}}}, lists by round, costs summed up.

    Raises:
        InputError: OUT holds rounds of other settings, or the data cannot be replayed.
        ConfigError: a strategy is unknown.
    """
    _check(job)
    keep = _Kept(out, job)
    tasks = list(_open_tasks(job, keep))
    total = job.full_seeds + len(job.seeds) * (1 + len(job.strategies) * (job.plan.rounds - 1))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(_workers(workers), context, _start, (job,)) as pool:
        try:
            running: dict[Future[Played], _Task] = {pool.submit(_do, task): task for task in tasks}
            while running:
                if tell is not None:
                    tell(keep.done(job), total)
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    task = running.pop(future)
                    for following in keep.take(task, future.result()):
                        running[pool.submit(_do, following)] = following
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if tell is not None:
        tell(total, total)
    return keep.document(job)


def _check(job: ReplayJob) -> None:
    """Refuses here what would fail in every worker, where nobody is told why or only after trainings."""
    check_strategies(job.strategies)
    bench = Bench(open_replay(job.data, measure=job.measure, modality=job.modality), job.plan)
    for seed in job.seeds:
        begin(bench, seed)


def _workers(asked: int | None) -> int:
    if asked is not None:
        return max(1, asked)
    cores = os.cpu_count() or 1
    return min(4, cores) if torch.cuda.is_available() else cores


_bench: list[Bench] = []
"""The one bench of a worker process."""


def _start(job: ReplayJob) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    _bench.append(Bench(open_replay(job.data, measure=job.measure, modality=job.modality), job.plan))


def _end_after(parent: BaseProcess) -> None:
    """Ends this process once its parent is dead: a pool's workers outlive a parent that was killed."""
    parent.join()
    os._exit(1)


def _do(task: _Task) -> Played:
    bench = _bench[0]
    if task.labelled is None and task.number < 0:
        model = fit(bench, list(bench.pool), task.seed, times=bench.plan.full_steps, look=False)
        return Played(model.figures, {}, Labelled())
    labelled = task.labelled or begin(bench, task.seed)
    return play(bench, task.seed, task.number, labelled, task.strategies)


def _open_tasks(job: ReplayJob, keep: "_Kept") -> Iterator[_Task]:
    """What can be played at once: each seed's first round, or the round after the last that is kept."""
    for seed in job.seeds:
        fresh = tuple(name for name in job.strategies if keep.load(name, seed, 0) is None)
        if fresh:
            yield _Task(seed, 0, fresh, None)
        for name in job.strategies:
            if name not in fresh:
                yield from keep.after(name, seed)
    for seed in range(job.full_seeds):
        if keep.load(FULL, seed, 0) is None:
            yield _Task(seed, -1, (FULL,), None)


class _Kept:
    """The rounds in OUT/rounds/STRATEGY/SEED-NUMBER.json: what was labelled, the figures, what is labelled next.

    "next" is null where the pool is exhausted, and where nobody asked since "last" is true: it was the plan's last.
    """

    def __init__(self, out: Path, job: ReplayJob) -> None:
        self._root = out / "rounds"
        self._rounds = job.plan.rounds
        mark = self._root / "identity"
        if mark.exists() and mark.read_text(encoding="utf-8") != job.identity:
            raise InputError(f"{out} holds a replay of other settings; choose another folder with --out, or empty it")
        write_text(mark, job.identity)

    def load(self, strategy: str, seed: int, number: int) -> dict[str, Any] | None:
        """A kept round, None where it was not played."""
        path = self._path(strategy, seed, number)
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def take(self, task: _Task, played: Played) -> list[_Task]:
        """Keeps what was played; what can be played now."""
        if task.number < 0:
            self._save(FULL, task.seed, 0, {"figures": dict(played.figures)})
            return []
        following = []
        for name in task.strategies:
            after = played.following[name]
            record = {
                "labelled": asdict(played.labelled),
                "figures": dict(played.figures),
                "next": None if after is None else asdict(after),
                "last": task.number + 1 >= self._rounds,
            }
            self._save(name, task.seed, task.number, record)
            following += self.after(name, task.seed)
        return following

    def after(self, strategy: str, seed: int) -> list[_Task]:
        """The first round of a strategy that is not kept yet; none where it is at its end.

        A kept round that was the last of a shorter plan is played again, so that it says what is labelled next.
        """
        for number in range(self._rounds - 1):
            record = self.load(strategy, seed, number)
            if record is None:
                return []
            if record["next"] is None:
                again = _Task(seed, number, (strategy,), _labelled(record["labelled"]))
                return [again] if record.get("last", True) else []
            if self.load(strategy, seed, number + 1) is None:
                return [_Task(seed, number + 1, (strategy,), _labelled(record["next"]))]
        return []

    def done(self, job: ReplayJob) -> int:
        """How many trainings are kept."""
        full = sum(self.load(FULL, seed, 0) is not None for seed in range(job.full_seeds))
        first = sum(all(self.load(name, seed, 0) for name in job.strategies) for seed in job.seeds)
        rest = [(n, s, r) for n in job.strategies for s in job.seeds for r in range(1, self._rounds)]
        return full + first + sum(self._path(*place).exists() for place in rest)

    def document(self, job: ReplayJob) -> dict[str, Any]:
        """All kept rounds of the job."""
        full = [self.load(FULL, seed, 0) for seed in range(job.full_seeds)]
        figures = [record["figures"] for record in full if record is not None]
        keys = sorted(set.intersection(*(set(found) for found in figures))) if figures else []
        return {
            "full": {key: float(np.mean([found[key] for found in figures])) for key in keys},
            "strategies": {name: {"seeds": [self._curve(name, seed) for seed in job.seeds]} for name in job.strategies},
        }

    def _curve(self, strategy: str, seed: int) -> dict[str, Any]:
        found = (self.load(strategy, seed, number) for number in range(self._rounds))
        records = [record for record in found if record is not None]
        costs = {
            key: [record["labelled"][key] for record in records]
            for key in ("cells", "corrections", "seconds", "foreground")
        }
        measured = sorted(set.intersection(*(set(record["figures"]) for record in records)))
        scores = {key: [record["figures"][key] for record in records] for key in measured}
        return {
            "seed": seed,
            "images": [len(record["labelled"]["taught"]) for record in records],
            **costs,
            **scores,
            "chosen": [record["labelled"]["chosen"] for record in records],
        }

    def _path(self, strategy: str, seed: int, number: int) -> Path:
        return self._root / strategy / f"{seed}-{number}.json"

    def _save(self, strategy: str, seed: int, number: int, record: dict[str, Any]) -> None:
        write_text(self._path(strategy, seed, number), json.dumps(record))


def _labelled(record: dict[str, Any]) -> Labelled:
    return Labelled(**{**record, "chosen": tuple(record["chosen"]), "taught": tuple(record["taught"])})
