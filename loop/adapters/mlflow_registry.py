"""Runs and model versions in MLflow: one experiment and one registered model a project.

The alias `champion` is the one switch that says which model is in use; `challenger` is the model that waits for the
gate. Weights are safetensors and JSON, uploaded as they are: nothing is pickled, and loading runs no code.

Each process that uses this puts CLIENT_ENVIRONMENT into its environment at its start (mlflow_server.py says why).
"""

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop.adapters.mlflow_run import Run, flatten
from loop.adapters.mlflow_server import CLIENT_ENVIRONMENT, Server
from loop.adapters.mlflow_version import (
    CHECKPOINT_FILES,
    DECISION,
    METRICS,
    REASON,
    ModelVersion,
    hash_tags,
    is_intact,
    model_version,
    move_into_place,
    version_number,
)
from loop.errors import CheckpointError, InputError, LoopError, NonFiniteError, StateError

__all__ = ["CLIENT_ENVIRONMENT", "ModelVersion", "Registry", "Run"]

logger = logging.getLogger(__name__)

CHAMPION, CHALLENGER = "champion", "challenger"
# Tags that the registry writes: what the gate decided of a version, and which versions were champion of the model.
HISTORY = "celloop.champions"


class Registry:
    """The runs of `experiment` and the versions of `model` on the MLflow server at `tracking_uri`.

    Both are made on first use. Every method raises UnreachableError when the server gives no answer and RefusedError
    when it says no. Safe for several threads; one process at a time should decide (promote, refuse, rollback).
    """

    def __init__(self, tracking_uri: str, experiment: str, model: str) -> None:
        self.experiment = experiment
        self.model = model
        self._server = Server(tracking_uri)

    def __repr__(self) -> str:
        return f"Registry({self._server.address!r}, {self.experiment!r}, {self.model!r})"

    def of_model(self, model: str) -> "Registry":
        """The registry of another model, its runs in the same experiment."""
        return Registry(self._server.address, self.experiment, model)

    def check(self) -> None:
        """Return when the server answers and lets us in; raise otherwise."""
        with self._server.asking("list experiments") as client:
            client.search_experiments(max_results=1)

    # runs

    @contextmanager
    def start_run(self, name: str, *, params: Mapping[str, Any], tags: Mapping[str, object]) -> Iterator[Run]:
        """A new run, FINISHED when the body ends, FAILED when it raises, KILLED when it is interrupted.

        Args:
            name: shown in MLflow's list of runs.
            params: settings; nested mappings become dotted names.
            tags: what `find_run` finds it by.
        """
        texts = {key: str(value) for key, value in tags.items()}
        with self._server.asking(f"start run {name}") as client:
            run_id = client.create_run(self._experiment_id(client), tags=texts, run_name=name).info.run_id
        run = Run(self._server, run_id)
        try:
            self._server.log_params(run_id, list(flatten(params)))
            yield run
            run.flush()
        except BaseException as error:
            self._end_failed(run, "FAILED" if isinstance(error, Exception) else "KILLED", error)
            raise
        self._server.end_run(run_id, "FINISHED")

    def find_run(self, tags: Mapping[str, object]) -> str | None:
        """The id of the newest finished run with all these tags; None = there is none."""
        where = [f"tags.`{key}` = {_quoted(value)}" for key, value in tags.items()]
        with self._server.asking("look for a run") as client:
            experiment = client.get_experiment_by_name(self.experiment)
            if experiment is None:
                return None
            runs = client.search_runs(
                [experiment.experiment_id],
                " and ".join([*where, "attributes.status = 'FINISHED'"]),
                order_by=["attributes.start_time DESC"],
                max_results=1,
            )
        return str(runs[0].info.run_id) if runs else None

    # versions

    def register(self, run_id: str, checkpoint_dir: Path, *, tags: Mapping[str, object]) -> ModelVersion:
        """The model version of a run, made from its checkpoint; a run that has one keeps it.

        Raises:
            CheckpointError: `checkpoint_dir` lacks a file.
        """
        texts = {key: str(value) for key, value in tags.items()}
        texts |= hash_tags(checkpoint_dir)
        with self._server.asking(f"register the model of run {run_id}") as client:
            known = self._search(client, f"run_id = {_quoted(run_id)}")
            if known:
                return known[0]
            for file in CHECKPOINT_FILES:
                client.log_artifact(run_id, str(checkpoint_dir / file), "model")
            source = f"{client.get_run(run_id).info.artifact_uri}/model"
            self._server.ensure(client.create_registered_model, self.model)
            made = client.create_model_version(self.model, source, run_id, tags=texts, await_creation_for=0)
            return model_version(made)

    def find_version(self, tags: Mapping[str, object]) -> ModelVersion | None:
        """The newest version with all these tags; None = there is none."""
        with self._server.asking("look for a model version") as client:
            found = self._search(client, *(f"tags.`{key}` = {_quoted(value)}" for key, value in tags.items()))
        return found[-1] if found else None

    def versions(self) -> list[ModelVersion]:
        """All versions, the oldest first."""
        with self._server.asking(f"list the versions of {self.model}") as client:
            return self._search(client)

    def version(self, number: int) -> ModelVersion:
        """The version of that number.

        Raises:
            StateError: there is none.
        """
        with self._server.asking(f"read version {number} of {self.model}") as client:
            found = self._get_version(client, number)
        if found is None:
            raise StateError(f"{self.model} has no version {number}; `celloop status` lists the versions")
        return found

    def champion(self) -> ModelVersion | None:
        """The model in use; None = no model was promoted yet."""
        return self._alias(CHAMPION)

    def challenger(self) -> ModelVersion | None:
        """The model that waits for the gate; None = none does."""
        return self._alias(CHALLENGER)

    def history(self) -> list[int]:
        """The versions that were champion, the one in use last; those that a rollback took back are left out."""
        with self._server.asking(f"read the champions of {self.model}") as client:
            standing = self._standing(client)
        return standing.past()

    def add_metrics(self, version: ModelVersion | int, metrics: Mapping[str, float], *, step: int = 0) -> bool:
        """Put metrics on the run of a version, though it has ended; those that it has already are left alone.

        Returns:
            False where the version or its run is gone, and nothing was written.

        Raises:
            RefusedError: MLflow does not take a name or a value.
        """
        number = version_number(version)
        with self._server.asking(f"put metrics on version {number} of {self.model}") as client:
            found = self._get_version(client, number)
            run = self._server.optional(client.get_run, found.run_id) if found is not None and found.run_id else None
        if run is None or run.info.lifecycle_stage == "deleted":
            return False
        now = int(time.time() * 1000)
        fresh = [(k, float(v), now, step) for k, v in metrics.items() if run.data.metrics.get(k) != v]
        if fresh:
            self._server.log_metrics(run.info.run_id, fresh)
        return True

    # decisions

    def set_challenger(self, version: ModelVersion | int) -> None:
        """Let this version wait for the gate."""
        number = self.version(version_number(version)).version
        with self._server.asking(f"make version {number} of {self.model} the challenger") as client:
            client.set_registered_model_alias(self.model, CHALLENGER, str(number))

    def promote(self, version: ModelVersion | int, reason: str, metrics: Mapping[str, Any]) -> ModelVersion:
        """Make this version the champion, and write why; it waits for no gate any more.

        Repeated after a kill at any point it ends in the same state.

        Raises:
            NonFiniteError: `metrics` holds NaN or infinity.
            StateError: there is no such version.
        """
        number = self._decide(version, "promoted", reason, metrics)
        with self._server.asking(f"promote version {number} of {self.model}") as client:
            standing = self._standing(client)
            if standing.champion != number:
                self._write_history(client, [*standing.past(), number])
                client.set_registered_model_alias(self.model, CHAMPION, str(number))
            self._drop_challenger(client, number)
        return self.version(number)

    def refuse(self, version: ModelVersion | int, reason: str, metrics: Mapping[str, Any]) -> ModelVersion:
        """Keep the champion and write why this version did not replace it; it waits for no gate any more.

        Raises:
            NonFiniteError: `metrics` holds NaN or infinity.
            StateError: there is no such version.
        """
        number = self._decide(version, "refused", reason, metrics)
        with self._server.asking(f"refuse version {number} of {self.model}") as client:
            self._drop_challenger(client, number)
        return self.version(number)

    def rollback(self, reason: str) -> ModelVersion:
        """The champion before, in use again; can be repeated as far back as there were champions.

        Raises:
            StateError: there is no champion, or none before it.
        """
        with self._server.asking(f"roll {self.model} back") as client:
            standing = self._standing(client)
            if standing.champion is None:
                raise StateError(f"{self.model} has no champion to roll back from; run a round first")
            earlier = standing.past()[:-1]
            while earlier and self._get_version(client, earlier[-1]) is None:
                earlier.pop()  # deleted in MLflow since
            if not earlier:
                raise StateError(f"{self.model}-v{standing.champion} is the first champion; there is none before it")
            self._write_tags(client, standing.champion, {DECISION: "rolled back", REASON: reason})
            client.set_registered_model_alias(self.model, CHAMPION, str(earlier[-1]))
            self._write_history(client, earlier)
        return self.version(earlier[-1])

    def download(self, version: ModelVersion, cache_dir: Path) -> Path:
        """The folder CACHE_DIR/LABEL with the version's checkpoint; fetched once, whole or not at all.

        A cached checkpoint is checked against the hashes that `register` wrote, and needs no server.

        Raises:
            CheckpointError: what MLflow sent is not what was registered.
            ServiceError: it cannot be written to `cache_dir`.
        """
        target = cache_dir / version.label
        if is_intact(target, version):
            return target
        with self._server.asking(f"fetch {version.label}"):
            cache_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{version.label}-", dir=cache_dir) as scratch:
                fresh = Path(scratch) / "checkpoint"
                fresh.mkdir()
                self._server.fetch(version.source, CHECKPOINT_FILES, fresh)
                if not is_intact(fresh, version):
                    raise CheckpointError(
                        f"what MLflow holds for {version.label} is not what was registered; roll back, or train anew"
                    )
                move_into_place(fresh, target, version)
        return target

    # what the methods above share; each is called inside Server.asking

    def _experiment_id(self, client: Any) -> str:
        known = client.get_experiment_by_name(self.experiment)
        if known is None:
            self._server.ensure(client.create_experiment, self.experiment)
            known = client.get_experiment_by_name(self.experiment)
        if known.lifecycle_stage == "deleted":
            raise StateError(
                f"experiment {self.experiment!r} was deleted in MLflow; bring it back with "
                f"`mlflow experiments restore --experiment-id {known.experiment_id}`"
            )
        return str(known.experiment_id)

    def _end_failed(self, run: Run, status: str, error: BaseException) -> None:
        """Send what is left and end the run; if MLflow is away too, say so beside the first error."""
        for last in (run.flush, lambda: self._server.end_run(run.run_id, status)):
            try:
                last()
            except LoopError as second:
                error.add_note(f"run {run.run_id} could not be ended in MLflow: {second}")
                logger.warning("run %s could not be ended: %s", run.run_id, second)

    def _alias(self, alias: str) -> ModelVersion | None:
        with self._server.asking(f"read the {alias} of {self.model}") as client:
            number = self._standing(client).aliases.get(alias)
            return None if number is None else self._get_version(client, number)

    def _standing(self, client: Any) -> "_Standing":
        model = self._server.optional(client.get_registered_model, self.model)
        if model is None:
            return _Standing({}, [])
        text = model.tags.get(HISTORY, "[]")
        try:
            history = [int(number) for number in json.loads(text)]
        except (ValueError, TypeError) as error:
            said = f"tag {HISTORY} of model {self.model} is {text!r}"
            raise StateError(f"{said}; correct it to a list of versions, e.g. [1, 3]") from error
        return _Standing({alias: int(number) for alias, number in model.aliases.items()}, history)

    def _search(self, client: Any, *conditions: str) -> list[ModelVersion]:
        """All versions that meet the conditions, the oldest first."""
        where = " and ".join([f"name = {_quoted(self.model)}", *conditions])
        found: list[ModelVersion] = []
        token = None
        while True:
            page = client.search_model_versions(where, max_results=1000, page_token=token)
            found += [model_version(item) for item in page]
            token = page.token
            if not token:
                return sorted(found, key=lambda version: version.version)

    def _get_version(self, client: Any, number: int) -> ModelVersion | None:
        found = self._server.optional(client.get_model_version, self.model, str(number))
        return None if found is None else model_version(found)

    def _decide(self, version: ModelVersion | int, decision: str, reason: str, metrics: Mapping[str, Any]) -> int:
        """Write the gate's decision on the version and return its number."""
        number = self.version(version_number(version)).version
        try:
            text = json.dumps(metrics, allow_nan=False, sort_keys=True, default=float)
        except ValueError as error:
            raise NonFiniteError(f"the metrics of {self.model}-v{number} hold NaN or infinity: {metrics}") from error
        with self._server.asking(f"write the decision on version {number} of {self.model}") as client:
            self._write_tags(client, number, {REASON: reason, METRICS: text, DECISION: decision})
        return number

    def _write_tags(self, client: Any, number: int, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            client.set_model_version_tag(self.model, str(number), key, value)

    def _write_history(self, client: Any, history: list[int]) -> None:
        client.set_registered_model_tag(self.model, HISTORY, json.dumps(history))

    def _drop_challenger(self, client: Any, number: int) -> None:
        if self._standing(client).aliases.get(CHALLENGER) == number:
            client.delete_registered_model_alias(self.model, CHALLENGER)


@dataclass(frozen=True)
class _Standing:
    """Which version each alias names, and the versions that were champion as last written."""

    aliases: dict[str, int]
    history: list[int]

    @property
    def champion(self) -> int | None:
        return self.aliases.get(CHAMPION)

    def past(self) -> list[int]:
        """The champions up to the one in use; what follows it was left by a rollback or a kill and counts no more."""
        if self.champion is None:
            return self.history
        if self.champion not in self.history:
            return [*self.history, self.champion]
        return self.history[: len(self.history) - self.history[::-1].index(self.champion)]


def _quoted(value: object) -> str:
    """The value as MLflow's search language writes it; it has no way to write both kinds of quotes."""
    text = str(value)
    for quote in ("'", '"'):
        if quote not in text:
            return f"{quote}{text}{quote}"
    raise InputError(f"{text!r} holds both kinds of quotes, which MLflow cannot search for; use one kind")
