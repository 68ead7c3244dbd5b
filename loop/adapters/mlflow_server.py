"""The connection to one MLflow server: a sign of life before each call, and its errors in plain words.

The only file that imports mlflow, and only once a call is made: the import takes a second, and reads the environment.
How long MLflow's client tries again when the server goes away is set there and nowhere else, so each process puts
CLIENT_ENVIRONMENT into its environment at its start (`os.environ.setdefault` for each); MLflow's own defaults try for
over four minutes. Even without it, a server that is away already is noticed within PROBE_S seconds.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import requests

from loop.errors import ConfigError, LoopError, RefusedError, ServiceError, UnreachableError

CLIENT_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # s for one answer
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",  # waits of 1, 2 and 4 s between tries
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
)
PROBE_S = 5.0


class Server:
    """MLflow at `tracking_uri` (http or https); no global setting of MLflow's is changed, no call made at first."""

    def __init__(self, tracking_uri: str) -> None:
        parts = urlsplit(tracking_uri)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"the MLflow address has scheme {parts.scheme!r}; give a server, e.g. http://127.0.0.1:5000"
            )
        if "@" in parts.netloc:
            raise ConfigError(
                "the MLflow address holds a user or password; put them into MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, out of logs and error texts"
            )
        self.address = tracking_uri.rstrip("/")
        self._client: Any = None
        self._lock = threading.Lock()

    @contextmanager
    def asking(self, what: str) -> Iterator[Any]:
        """MLflow's client, for the calls of the body; `what` they do is said when they fail.

        Raises:
            UnreachableError: no sign of life within PROBE_S, or none during the body.
            RefusedError: the server says no.
            ServiceError: a file cannot be read or written here.
        """
        from mlflow.exceptions import MlflowException, RestException

        client = self._open()
        self._probe(what)
        try:
            yield client
        except LoopError:
            raise
        except RestException as error:
            raise self._refused(what, error) from error
        except MlflowException as error:
            raise self._explain(what, error) from error
        except requests.HTTPError as error:
            raise self._refused(what, error) from error
        except requests.RequestException as error:
            raise self._unreachable(what, error) from error
        except OSError as error:
            raise ServiceError(f"cannot {what}: {error}; check the folder and the free space") from error

    def optional(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """What the call returns; None when MLflow has no such thing. Only inside `asking`."""
        from mlflow.exceptions import RestException

        try:
            return call(*arguments)
        except RestException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def ensure(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """What the creating call returns; None when the thing exists already. Only inside `asking`."""
        from mlflow.exceptions import RestException

        try:
            return call(*arguments)
        except RestException as error:
            if error.error_code == "RESOURCE_ALREADY_EXISTS":
                return None
            raise

    def log_metrics(self, run_id: str, metrics: Sequence[tuple[str, float, int, int]]) -> None:
        """Send (name, value, ms since 1970, step) for a run; at most 1,000, MLflow's limit."""
        from mlflow.entities import Metric

        with self.asking(f"log metrics of run {run_id}") as client:
            client.log_batch(run_id, metrics=[Metric(*metric) for metric in metrics])

    def log_params(self, run_id: str, params: Sequence[tuple[str, str]]) -> None:
        """Send the parameters of a run, 100 a request, MLflow's limit."""
        from mlflow.entities import Param

        with self.asking(f"log parameters of run {run_id}") as client:
            for start in range(0, len(params), 100):
                client.log_batch(run_id, params=[Param(*pair) for pair in params[start : start + 100]])

    def end_run(self, run_id: str, status: str) -> None:
        """Give the run its last status and its end time.

        Goes to the client's store: `MlflowClient.set_terminated` prints to stdout, where only documents belong, and
        `update_run` leaves the end time empty.
        """
        from mlflow.entities import RunStatus

        with self.asking(f"end run {run_id}") as client:
            store = client._tracking_client.store
            store.update_run_info(run_id, RunStatus.from_string(status), int(time.time() * 1000), None)

    def fetch(self, source: str, files: Sequence[str], folder: Path) -> None:
        """Write the named files of the artifact folder `source` into `folder`. Only inside `asking`."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        repository = get_artifact_repository(source, tracking_uri=self.address, registry_uri=self.address)
        for file in files:
            repository._download_file(file, str(folder / file))  # the public way lists first and draws a bar

    def _open(self) -> Any:
        with self._lock:
            if self._client is None:
                from mlflow import MlflowClient
                from mlflow.telemetry.client import _set_telemetry_client

                _set_telemetry_client(None)  # nothing phones home, whatever the environment says
                self._client = MlflowClient(tracking_uri=self.address, registry_uri=self.address)
            return self._client

    def _probe(self, what: str) -> None:
        """One short request without retries; any answer but a proxy's "nobody behind me" is a sign of life."""
        from mlflow.exceptions import MlflowException
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        host = get_default_host_creds(self.address)
        try:
            answer = http_request(
                host, "/health", "GET", max_retries=0, backoff_factor=0, timeout=PROBE_S, raise_on_status=False
            )
        except MlflowException as error:
            raise self._unreachable(what, error) from error
        if answer.status_code in (502, 503, 504):
            raise self._unreachable(what, f"status {answer.status_code}")

    def _explain(self, what: str, error: Exception) -> ServiceError:
        """MLflow wraps a connection that failed and an answer of 500 after all tries in the same class."""
        text = str(error)
        away = "failed with exception" in text or "timeout exception" in text
        if away and "error responses" not in text:
            return self._unreachable(what, error)
        return self._refused(what, error)

    def _unreachable(self, what: str, error: object) -> UnreachableError:
        return UnreachableError(
            f"cannot {what}: MLflow at {self.address} gives no answer; start it with `celloop up` or correct the "
            f"address ({_short(error)})"
        )

    def _refused(self, what: str, error: object) -> RefusedError:
        text = _short(error)
        cure = ""
        if "Invalid Host header" in text:
            cure = "; start the server with --allowed-hosts naming the host of its address"
        elif "code 401" in text or "UNAUTHENTICATED" in text or "PERMISSION_DENIED" in text:
            cure = "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return RefusedError(f"cannot {what}: MLflow at {self.address} says no: {text}{cure}")


def _short(error: object) -> str:
    return " ".join(str(error).split())[:500]
