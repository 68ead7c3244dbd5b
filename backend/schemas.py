"""The wire: what Label Studio 1.23 sends and what it may be answered. Unknown keys are ignored, ours are checked."""

import math
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from backend.errors import BadRequestError
from loop.errors import NonFiniteError, StateError


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


def label_studio_id(value: object) -> int:
    """The project id in "<id>.<unix time>" (as Label Studio sends it), "<id>" or a number.

    Raises:
        ValueError: it is none of these.
    """
    head = str(value).partition(".")[0]
    if isinstance(value, bool) or not head.isascii() or not head.isdigit() or len(head) > 18:
        raise ValueError('expected "<project id>.<unix time>"')
    return int(head)


class _OfProject(_Wire):
    project: int

    @field_validator("project", mode="before")
    @classmethod
    def _id_only(cls, value: object) -> int:
        return label_studio_id(value)


class SetupRequest(_OfProject):
    """POST /setup. Nothing of it is kept; the access token in it is never looked at."""

    extra_params: dict[str, Any] = Field(default_factory=dict)

    @field_validator("extra_params", mode="before")
    @classmethod
    def _dict_or_json(cls, value: object) -> object:
        if value is None or value == "":
            return {}
        if isinstance(value, str):
            try:
                return orjson.loads(value)
            except orjson.JSONDecodeError as error:
                raise ValueError("expected a JSON object, or one written as a string") from error
        return value


class Task(_Wire):
    """One task of a /predict request. With a click comes what is drawn already; what is malformed there is dropped.

    Attributes:
        id: its number in Label Studio.
        data: what it holds.
        annotations: all of the task.
        drafts: those of the person who clicks.
        predictions: all of the task.
    """

    id: int | None = None
    data: dict[str, Any]
    annotations: list[dict[str, Any]] = Field(default_factory=list)
    drafts: list[dict[str, Any]] = Field(default_factory=list)
    predictions: list[dict[str, Any]] = Field(default_factory=list)

    @field_validator("annotations", "drafts", "predictions", mode="before")
    @classmethod
    def _objects_only(cls, value: object) -> object:
        return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []

    @property
    def name(self) -> str:
        """How logs and errors call the task."""
        return f"task {self.id}" if self.id is not None else "the task"

    @property
    def on_screen(self) -> dict[str, Any]:
        """What the person sees drawn, as it came."""
        return {"annotations": self.annotations, "drafts": self.drafts, "predictions": self.predictions}


class Params(_Wire):
    """`context` is there for a click, absent for a batch."""

    context: dict[str, Any] | None = None

    @field_validator("context")
    @classmethod
    def _regions(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        regions = value.get("result", []) if value is not None else []
        if not isinstance(regions, list) or not all(isinstance(region, dict) for region in regions):
            raise ValueError('expected {"result": [regions]}')
        return value


class PredictRequest(_OfProject):
    """POST /predict, batch or interactive."""

    tasks: tuple[Task, ...] = Field(min_length=1)
    label_config: str = ""
    params: Params = Params()

    @field_validator("params", mode="before")
    @classmethod
    def _none_is_empty(cls, value: object) -> object:
        return {} if value is None else value

    @field_validator("label_config", mode="before")
    @classmethod
    def _no_config(cls, value: object) -> object:
        return "" if value is None else value


class WebhookProject(_Wire):
    """The project of an event; its many other fields, the token among them, are not read."""

    id: int


class WebhookEvent(_Wire):
    """POST /webhook: only what happened, and in which project."""

    action: str = Field(max_length=100)
    project: WebhookProject | None = None


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], body: bytes) -> Model:
    """A request's body as `model`.

    Raises:
        BadRequestError: no JSON object, or a field is missing or of the wrong kind. No value of the body is repeated.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"the body is no JSON ({len(body)} bytes): {error.msg}; send a JSON object") from error
    try:
        return model.model_validate(document)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors()[:5])
        raise BadRequestError(f"the request is not what Label Studio sends: {faults}") from error


def prediction_item(result: list[dict[str, Any]], score: float, model_version: str) -> orjson.Fragment:
    """One prediction that Label Studio can store and show, as JSON.

    Args:
        result: regions, may be empty.
        score: finite.
        model_version: not empty.

    Raises:
        NonFiniteError: the score or a number in a region is NaN or infinite.
        StateError: a region is no object, or there is no version. Either would make the task unopenable.
    """
    if not all(isinstance(region, dict) for region in result):
        raise StateError(f"a region is no JSON object but {[type(region).__name__ for region in result][:3]}")
    if not model_version:
        raise StateError("a prediction without a model version; Label Studio cannot store it")
    item = orjson.dumps({"result": result, "score": float(score), "model_version": model_version})
    # orjson writes NaN and infinity as null: without that word there is none, and the slow search is not needed.
    if b"null" in item and not (math.isfinite(score) and _finite(result)):
        raise NonFiniteError(f"version {model_version} gave NaN or infinity; the prediction is not sent")
    return orjson.Fragment(item)


def _finite(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(_finite(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_finite(item) for item in value)
    return True
