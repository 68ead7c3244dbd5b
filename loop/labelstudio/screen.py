"""The cells that a person sees while clicking, from the task of an interactive request."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loop.errors import LoopError
from loop.labelstudio.interface import Interface
from loop.labelstudio.regions import is_prompt, kind_of, name_of
from loop.labelstudio.results import from_results
from loop.types import Instances

logger = logging.getLogger(__name__)


def others_on_screen(
    task: Mapping[str, Any],
    interface: Interface,
    shape: tuple[int, int],
    *,
    version: str = "",
    near: Sequence[float] | None = None,
) -> Instances:
    """The cells that are drawn in the task already: never an error, since a click must not fail on an odd region.

    They are those of the newest draft, else of the newest annotation that is not a skipped one, else of the newest
    prediction of `version`, else of the newest prediction. A list that is empty counts: there the person deleted
    everything. Prompts and done areas are no cells. What cannot be read is left out, with a line in the log.

    Args:
        task: of the request, with "annotations", "drafts" and "predictions" as Label Studio sends them; each may be
            missing.
        interface: of the project's label config.
        shape: (H, W) of the image, px.
        version: the published version.
        near: x0, y0, x1, y1 px: only cells whose box touches this one are wanted, and polygons elsewhere are not even
            read; None = all. Cells of other kinds are read wherever they are.

    Returns:
        N >= 0 cells in the order of their regions, source "model": who drew each is not asked.
    """
    regions = [region for region in _shown(task, version) if _wanted(region, interface, shape, near)]
    found = _read(regions, interface, shape)
    if near is None or not len(found):
        return found
    boxes = found.boxes_xyxy
    touching = (boxes[:, :2] < np.asarray(near)[2:]).all(axis=1) & (boxes[:, 2:] > np.asarray(near)[:2]).all(axis=1)
    return found.take(np.flatnonzero(touching))


def _shown(task: Mapping[str, Any], version: str) -> list[Any]:
    """The result list on screen."""
    annotations = [item for item in _bodies(task, "annotations") if not item.get("was_cancelled")]
    predictions = _bodies(task, "predictions")
    published = [item for item in predictions if item.get("model_version") == version]
    for bodies in (_bodies(task, "drafts"), annotations, published, predictions):
        if bodies:
            newest: list[Any] = max(bodies, key=_age)["result"]
            return newest
    return []


def _bodies(task: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The drafts, annotations or predictions of a task that have a list of regions."""
    bodies = task.get(key)
    if not isinstance(bodies, list):
        return []
    return [body for body in bodies if isinstance(body, dict) and isinstance(body.get("result"), list)]


def _age(body: Mapping[str, Any]) -> tuple[str, int]:
    """Grows with the time of the last change; Label Studio writes all times alike, in UTC. Of equal times, the id."""
    number = body.get("id")
    return str(body.get("updated_at") or body.get("created_at") or "").rstrip("Z"), number if isinstance(
        number, int
    ) else 0


def _wanted(region: Any, interface: Interface, shape: tuple[int, int], near: Sequence[float] | None) -> bool:
    """Whether a region is worth reading: no prompt, and no polygon that lies elsewhere."""
    if not isinstance(region, dict) or is_prompt(region, interface):
        return False
    if near is None or kind_of(region) != "polygon":
        return True
    try:
        percent = np.asarray(region["value"]["points"], np.float64)
        x0, y0 = percent.min(axis=0) * (shape[1] / 100, shape[0] / 100)
        x1, y1 = percent.max(axis=0) * (shape[1] / 100, shape[0] / 100)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        logger.debug("%s is not looked at: %s: %s", name_of(region), type(error).__name__, error)
        return False
    return bool(x0 < near[2] and x1 > near[0] and y0 < near[3] and y1 > near[1])


def _read(regions: Sequence[Any], interface: Interface, shape: tuple[int, int]) -> Instances:
    """The cells of regions; where one spoils the rest, each is read by itself."""
    try:
        parsed = from_results(regions, interface, shape, source="model")
    except Exception as error:  # of whatever kind: regions come unchecked from a browser
        if len(regions) == 1:
            level = logging.DEBUG if isinstance(error, LoopError) else logging.WARNING
            logger.log(level, "%s is left out: %s: %s", name_of(regions[0]), type(error).__name__, error)
            return Instances.build(shape)
        return _together([_read([region], interface, shape) for region in regions], shape)
    for fault in parsed.unreadable:
        logger.debug("left out: %s", fault)
    return parsed.instances


def _together(parts: Sequence[Instances], shape: tuple[int, int]) -> Instances:
    return Instances.build(
        shape,
        [box for part in parts for box in part.boxes_xyxy.tolist()],
        [mask for part in parts for mask in part.masks],
        scores=[score for part in parts for score in part.scores.tolist()],
        labels=[label for part in parts for label in part.labels.tolist()],
        source="model",
    )
