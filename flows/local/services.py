"""Each service as data: its command, environment, port and how it says that it is well.

`celloop up` starts these on one machine (flows/local/supervisor.py); docker-compose.yml says the same with other
addresses, and a test holds the two together. Secrets travel in the environment, never on a command line.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

POOL = "celloop"
LOOPBACK = "127.0.0.1"
DEFAULT_PORTS = {"label_studio": 8080, "mlflow": 5000, "prefect": 4200, "backend": 9090, "worker": 4210}
TITLES = {
    "label_studio": "Label Studio",
    "mlflow": "MLflow",
    "prefect": "Prefect",
    "backend": "backend",
    "worker": "Prefect worker",
}

HEALTH_PATHS = {
    "label_studio": "/health",
    "mlflow": "/health",
    "prefect": "/api/health",
    "backend": "/health",
    "worker": "/health",
}

NEIGHBOURS = "127.0.0.1,localhost,label-studio,mlflow,prefect,backend.internal"
NO_CALLS_HOME = {
    "DO_NOT_TRACK": "1",
    "HTTP_PROXY": f"http://{LOOPBACK}:9",
    "HTTPS_PROXY": f"http://{LOOPBACK}:9",
    "NO_PROXY": NEIGHBOURS,
}
"""For the three servers: they have no business outside, so the way out is a proxy that is not there.

Label Studio fetches tips from the web whenever a page asks for them, and no setting of its own turns that off.
"""


@dataclass(frozen=True)
class Site:
    """Where the services of one installation listen, keep their state and find each other.

    Attributes:
        host: what they bind to; loopback on a person's machine, 0.0.0.0 inside a container.
        root: the workspace.
        urls: service name to base URL as the others see it, without a trailing slash.
        label_studio_program: what starts Label Studio.
        python: the application's interpreter.
    """

    host: str
    root: Path
    ports: Mapping[str, int]
    urls: Mapping[str, str]
    label_studio_program: str = "label-studio"
    python: str = sys.executable


@dataclass(frozen=True)
class Service:
    """One process to run.

    Attributes:
        command: program and arguments; holds no secret.
        environment: what it needs beyond the person's own PATH, HOME and the like.
        secrets: more environment, not shown in the repr.
        health_path: GET of this on its port answers 200 when it is well.
        after: services that must be well before it starts.
        deadline_s: how long it may take to become well.
        restarts: started again when it ends; for those that keep nothing in memory that others rely on.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    port: int
    health_path: str
    after: tuple[str, ...] = ()
    deadline_s: float = 120.0
    restarts: bool = False
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def title(self) -> str:
        """Its name for people."""
        return TITLES[self.name]

    @property
    def health_url(self) -> str:
        """Where to ask how it is, from this machine."""
        return f"http://{LOOPBACK}:{self.port}{self.health_path}"


def label_studio(site: Site, secrets: Mapping[str, str]) -> Service:
    """Label Studio on SQLite with one user, local images and backends on private addresses allowed, nothing sent out.

    Since 1.23.1 it refuses backends and webhooks on loopback and private networks unless ML_BLOCK_LOCAL_IP and
    SSRF_PROTECTION_ENABLED are off; backends elsewhere on a private network stay reachable past the absent proxy.
    ML_TIMEOUT_HEALTH and _SETUP are raised: the backend answers at once, but on two busy cores that can be a second.
    """
    port = site.ports["label_studio"]
    return Service(
        name="label_studio",
        command=(
            *(site.label_studio_program, "start", "--no-browser"),
            *("--internal-host", site.host, "--port", str(port)),
        ),
        environment={
            **NO_CALLS_HOME,
            "NO_PROXY": f"{NEIGHBOURS},10.0.0.0/8,172.16.0.0/12,192.168.0.0/16",
            "XDG_CONFIG_HOME": f"{site.root}/label-studio",
            "LABEL_STUDIO_BASE_DATA_DIR": f"{site.root}/label-studio",
            "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
            "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
            "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(site.root),
            "LABEL_STUDIO_ML_BLOCK_LOCAL_IP": "false",
            "LABEL_STUDIO_SSRF_PROTECTION_ENABLED": "false",
            "LABEL_STUDIO_ML_TIMEOUT_HEALTH": "3",
            "LABEL_STUDIO_ML_TIMEOUT_SETUP": "5",
            "LABEL_STUDIO_ML_TIMEOUT_PREDICT": "100",
            "LABEL_STUDIO_COLLECT_ANALYTICS": "false",
            "LABEL_STUDIO_LATEST_VERSION_CHECK": "false",
            "LABEL_STUDIO_SENTRY_DSN": "",
            "LABEL_STUDIO_FRONTEND_SENTRY_DSN": "",
            "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        },
        secrets=secrets,
        port=port,
        health_path=HEALTH_PATHS["label_studio"],
        deadline_s=240.0,
    )


def mlflow(site: Site) -> Service:
    """MLflow's server with one worker and no job runner; it keeps runs in SQLite and serves the artifacts itself.

    It answers 403 to a Host header that it does not know; "mlflow" is its name in docker-compose.yml.
    """
    port = site.ports["mlflow"]
    return Service(
        name="mlflow",
        command=(
            *(site.python, "-m", "mlflow", "server", "--host", site.host, "--port", str(port), "--workers", "1"),
            *("--allowed-hosts", f"127.0.0.1:{port},localhost:{port},mlflow:{port}"),
            *("--backend-store-uri", f"sqlite:///{site.root}/mlflow/mlflow.db"),
            *("--artifacts-destination", f"{site.root}/mlflow/artifacts"),
        ),
        environment={
            **NO_CALLS_HOME,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
        port=port,
        health_path=HEALTH_PATHS["mlflow"],
    )


def prefect(site: Site) -> Service:
    """Prefect's server on SQLite: flow runs, schedules and its pages.

    A running flow holds its deployment's only slot by a lease. Leases in memory, the default, are lost with the server
    and the slot stays taken for ever; in PREFECT_HOME/concurrency_leases they outlive it and expire after five minutes.
    """
    port = site.ports["prefect"]
    return Service(
        name="prefect",
        command=(
            *(site.python, "-m", "prefect", "--no-prompt", "server", "start"),
            *("--host", site.host, "--port", str(port)),
        ),
        environment={
            **NO_CALLS_HOME,
            "PREFECT_HOME": f"{site.root}/prefect",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_SERVER_UI_API_URL": f"http://{LOOPBACK}:{port}/api",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        },
        port=port,
        health_path=HEALTH_PATHS["prefect"],
    )


def worker(site: Site, secrets: Mapping[str, str], *, pool: str = POOL) -> Service:
    """A Prefect worker that runs flows as processes; it makes its pool where there is none.

    It asks for work every two seconds: with the default of ten a round started by hand would wait that long.
    """
    port = site.ports["worker"]
    return Service(
        name="worker",
        command=(
            *(site.python, "-m", "prefect", "--no-prompt", "worker", "start", "--pool", pool, "--type", "process"),
            *("--name", pool, "--install-policy", "never", "--with-healthcheck"),
        ),
        environment={
            **loop_environment(site),
            "PREFECT_HOME": f"{site.root}/prefect",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_WORKER_WEBSERVER_HOST": site.host,
            "PREFECT_WORKER_WEBSERVER_PORT": str(port),
            "PREFECT_LOGGING_EXTRA_LOGGERS": "loop,flows",
        },
        secrets=secrets,
        port=port,
        health_path=HEALTH_PATHS["worker"],
        after=("prefect",),
    )


def backend(site: Site, secrets: Mapping[str, str]) -> Service:
    """The service that Label Studio asks for masks and clicks."""
    port = site.ports["backend"]
    return Service(
        name="backend",
        command=(site.python, "-m", "backend", "--host", site.host, "--port", str(port)),
        environment=loop_environment(site),
        secrets=secrets,
        port=port,
        health_path=HEALTH_PATHS["backend"],
        after=("mlflow",),
        restarts=True,
    )


def loop_environment(site: Site) -> dict[str, str]:
    """Where our own processes find the index, the models and the three servers."""
    return {
        "CELLOOP_WORKSPACE": str(site.root),
        "CELLOOP_MODELS_DIR": f"{site.root}/models",
        "CELLOOP_DISPLAY_ROOT": str(site.root),
        "CELLOOP_CONFIGS_DIR": f"{site.root}/configs",
        "CELLOOP_EMBEDDINGS_DIR": f"{site.root}/embeddings",
        "CELLOOP_LABEL_STUDIO_URL": site.urls["label_studio"],
        "CELLOOP_BACKEND_URL": site.urls["backend"],
        "MLFLOW_TRACKING_URI": site.urls["mlflow"],
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_API_URL": f"{site.urls['prefect']}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "NO_PROXY": NEIGHBOURS,
    }
