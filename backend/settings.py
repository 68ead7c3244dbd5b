"""Where the backend finds everything and what it refuses: addresses, secrets and two limits from the environment."""

import base64
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from loop.errors import ConfigError

MIB = 2**20

ENVIRONMENT = {
    "CELLOOP_INDEX_URL": "index_url",
    "CELLOOP_MODELS_DIR": "models_dir",
    "CELLOOP_DISPLAY_ROOT": "display_root",
    "CELLOOP_CONFIGS_DIR": "configs_dir",
    "CELLOOP_EMBEDDINGS_DIR": "embeddings_dir",
    "MLFLOW_TRACKING_URI": "mlflow_url",
    "CELLOOP_LABEL_STUDIO_URL": "label_studio_url",
    "CELLOOP_LABEL_STUDIO_TOKEN": "label_studio_token",
    "PREFECT_API_URL": "prefect_api_url",
    "CELLOOP_BACKEND_USER": "user",
    "CELLOOP_BACKEND_PASSWORD": "password",
    "CELLOOP_WEBHOOK_SECRET": "webhook_secret",
    "CELLOOP_BACKEND_MAX_IMAGE_PIXELS": "max_image_pixels",
    "CELLOOP_BACKEND_CLICKS_PER_S": "clicks_per_s",
}


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Settings(BaseModel):
    """Everything that `create_app` needs to know. Empty strings mean "not configured"."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    index_url: str = Field(min_length=1)
    models_dir: Path
    display_root: Path | None = Field(default=None, description="what /data/local-files/?d= is relative to")
    configs_dir: Path | None = Field(default=None, description="PROJECT.yaml below it are the projects' settings")
    embeddings_dir: Path | None = Field(default=None, description="images that SAM has encoded; None: in memory only")
    mlflow_url: str = ""
    label_studio_url: str = ""
    label_studio_token: SecretStr = SecretStr("")
    prefect_api_url: str = ""
    user: str = Field(default="", description="basic auth on every route but /health; with `password`")
    password: SecretStr = SecretStr("")
    webhook_secret: SecretStr = SecretStr("")
    device: str = "auto"

    poll_s: float = Field(default=3.0, gt=0, description="how often the registry is asked for the champion")
    retry_s: float = Field(default=60.0, ge=0, description="a model that cannot be loaded is tried again after this")
    debounce_s: float = Field(default=5.0, ge=0, description="a sync starts this long after the last webhook event")
    debounce_limit_s: float = Field(default=60.0, gt=0, description="and at the latest this long after the first one")
    lookup_s: float = Field(default=1.0, gt=0, description="for the index, in /setup; Label Studio waits 3 s")
    predict_s: float = Field(default=75.0, gt=0, description="a batch stops here; Label Studio waits 100 s")
    image_timeout_s: float = Field(default=20.0, gt=0, description="download of one image, in all")
    max_body_bytes: int = Field(default=32 * MIB, ge=1)
    body_s: float = Field(default=20.0, gt=0, description="a body must be here after this")
    max_bodies: int = Field(default=32, ge=1, description="bodies that are being received at once")
    max_tasks: int = Field(default=10_000, ge=1, description="in one batch")
    max_prompts: int = Field(default=500, ge=1, description="points and boxes of one click")
    max_label_config: int = Field(default=256 * 1024, ge=1, description="characters of XML")
    max_image_bytes: int = Field(default=256 * MIB, ge=1)
    max_image_pixels: int = Field(default=2**26, ge=1, description="H x W x planes by the header, before decoding")
    clicks_per_s: float = Field(default=10.0, gt=0, description="of one person, in the long run")
    click_burst: int = Field(default=30, ge=1, description="so many may come at once")
    waiting_people: int = Field(default=32, ge=0, description="clicks, and opened tasks, that wait for a thread")
    waiting_batches: int = Field(default=16, ge=0, description="batches that wait for a thread")
    start_s: float = Field(default=5.0, gt=0, description="a click or opened task waits this long for a thread")
    click_s: float = Field(default=60.0, gt=0, description="a click is answered by then, or refused")
    reply_s: float = Field(default=95.0, gt=0, description="so is every other prediction; Label Studio waits 100 s")
    map_cache_bytes: int = Field(default=256 * MIB, ge=0, description="probability maps kept for clicks")
    embedding_cache_bytes: int = Field(default=256 * MIB, ge=0, description="encoded images kept for clicks")

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "Settings":
        """The settings that `environ` holds under the names in ENVIRONMENT; unset and empty ones keep their default.

        Raises:
            ConfigError: a needed variable is missing, a value is unusable, or user and password do not come together.
                The text never repeats a value.
        """
        given = {field: environ[name] for name, field in ENVIRONMENT.items() if environ.get(name)}
        names = {field: name for name, field in ENVIRONMENT.items()}
        if ("user" in given) != ("password" in given):
            raise ConfigError(
                "only one of CELLOOP_BACKEND_USER and CELLOOP_BACKEND_PASSWORD is set; "
                "set both to ask for a password, or none"
            )
        if ":" in given.get("user", ""):
            raise ConfigError("CELLOOP_BACKEND_USER holds a colon, which basic auth cannot carry; choose another name")
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            faults = "; ".join(f"{names.get(str(e['loc'][0]), e['loc'][0])}: {e['msg']}" for e in error.errors())
            raise ConfigError(f"the backend cannot start: {faults}; set it in the environment") from error

    def secrets(self) -> tuple[str, ...]:
        """Every secret that is set, so that error texts and logs can be cleared of them.

        These are the tokens and passwords, the password as a browser sends it, and passwords within addresses.
        """
        held = [secret.get_secret_value() for secret in (self.label_studio_token, self.password, self.webhook_secret)]
        if self.user:
            held.append(base64.b64encode(f"{self.user}:{self.password.get_secret_value()}".encode()).decode())
        for url in (self.index_url, self.mlflow_url, self.label_studio_url, self.prefect_api_url):
            password = _password(url)
            held += [password, unquote(password)]
        return tuple(dict.fromkeys(secret for secret in held if secret))


def _password(url: str) -> str:
    """The password in an address, as it is written there; "" for none."""
    try:
        return urlsplit(url).password or ""
    except ValueError:
        return ""
