"""What a request's task says of its image, and how its label config is read."""

from functools import lru_cache

from backend.schemas import PredictRequest, Task
from loop.adapters.index import ProjectRow
from loop.config import LoopConfig
from loop.errors import ImageError
from loop.labelstudio.interface import Interface

_parse = lru_cache(maxsize=64)(Interface.parse)


def interface_of(request: PredictRequest, row: ProjectRow, config: LoopConfig) -> Interface:
    """The label config of a request, or the project's where it brings none, with the project's words.

    Raises:
        LabelError: it cannot hold masks.
    """
    names = config.publish
    return _parse(request.label_config or row.label_config, doubtful=names.doubtful_label, done=names.done_label)


def image_value(task: Task, interface: Interface) -> object:
    """Where the task's image is.

    Raises:
        ImageError: it has none under the name that the label config shows.
    """
    key = interface.image_value_key
    if key not in task.data:
        raise ImageError(f"{task.name} has no {key!r} but {sorted(task.data)[:10]}; the label config shows ${key}")
    return task.data[key]


def image_id(task: Task) -> str:
    """The image's id where `celloop init` made the task, else one from the task's number."""
    known = task.data.get("celloop_id")
    return known if isinstance(known, str) and known else f"task-{task.id}"
