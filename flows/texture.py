"""What images look like in numbers before there is a model: read once each, kept beside the predictions."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from flows.context import LoopContext, image_ref
from loop.adapters.index import ImageRow
from loop.data.predictions import array_file, read_arrays, write_arrays
from loop.data.store import read_image
from loop.data.texture import SIZE, describe
from loop.errors import ImageError
from loop.types import FloatArray

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

_READERS = 4


def textures(context: LoopContext, rows: Sequence[ImageRow], progress: Progress | None = None) -> dict[str, FloatArray]:
    """(SIZE,) float32 of `loop.data.texture.describe` by image id; an image that cannot be read is named and left out.

    Only what is not on disk yet for an image's present content is made. `progress` is called as progress(done, total).
    """
    directory = context.workspace.predictions_dir / "texture"

    def look(row: ImageRow) -> FloatArray | None:
        path = array_file(directory, image_ref(row))
        kept = read_arrays(path, {"texture"})
        if kept is not None and kept["texture"].shape == (SIZE,):
            return kept["texture"]
        try:
            numbers = describe(read_image(image_ref(row).path).pixels)
        except ImageError as error:
            logger.warning("%s is not looked at: %s", row.image_id, error)
            return None
        write_arrays(path, {"texture": numbers})
        return numbers

    found: dict[str, FloatArray] = {}
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        for done, (row, numbers) in enumerate(zip(rows, pool.map(look, rows), strict=True), start=1):
            if numbers is not None:
                found[row.image_id] = numbers
            if progress is not None:
                progress(done, len(rows))
    return found
