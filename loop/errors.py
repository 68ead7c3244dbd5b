"""Every way in which celloop refuses, on one page.

    LoopError
    +-- InputError              what a person gave cannot be used as it is
    |   +-- ImageError          an image file is corrupt, empty, unsupported or missing
    |   +-- LabelError          a label image or an annotation does not fit its image or the label config
    |   +-- OverlapError        overlapping masks were to be written into a format that cannot hold them
    |   +-- ShapeError          arrays that belong together differ in size
    |   +-- ConfigError         a setting is unknown, missing or out of its range
    +-- NonFiniteError          NaN or infinity where a number is needed; names the image
    +-- CheckpointError         a stored model is missing, truncated or of another architecture
    +-- ServiceError            Label Studio, MLflow, Prefect or the backend did not do what was asked
    |   +-- UnreachableError    no answer at all
    |   +-- RefusedError        an answer that says no (status and body are in the text)
    +-- StateError              the loop is not at the point where this can be done

Each text says what was given, what was expected and what to do. `LoopError.exit_code` is what the command
line exits with: 2 for bad usage or input, 1 for everything else.
"""


class LoopError(Exception):
    """Base of all errors that celloop raises on purpose."""

    exit_code = 1


class InputError(LoopError):
    """What a person gave cannot be used as it is."""

    exit_code = 2


class ImageError(InputError):
    """An image file is corrupt, empty, unsupported or missing."""


class LabelError(InputError):
    """A label image or an annotation does not fit its image or the label config."""


class OverlapError(InputError):
    """Overlapping masks were to be written into a format that cannot hold them."""


class ShapeError(InputError):
    """Arrays that belong together differ in size."""


class ConfigError(InputError):
    """A setting is unknown, missing or out of its range."""


class NonFiniteError(LoopError):
    """NaN or infinity where a number is needed; the text names the image."""


class CheckpointError(LoopError):
    """A stored model is missing, truncated or of another architecture."""


class ServiceError(LoopError):
    """Label Studio, MLflow, Prefect or the backend did not do what was asked."""


class UnreachableError(ServiceError):
    """A service gave no answer at all."""


class RefusedError(ServiceError):
    """A service answered no; its status and body are in the text."""


class StateError(LoopError):
    """The loop is not at the point where this can be done."""
