"""Encodes the images of a batch with SAM, so that the first click in each of them is answered at once."""

import logging
from collections.abc import Callable, Sequence

from flows.context import LoopContext
from flows.tasks import display_path
from loop.data.embeddings import EmbeddingStore, to_encode
from loop.data.store import file_sha256, read_image
from loop.errors import CheckpointError, LoopError
from loop.models.sam import Sam
from loop.models.sam_weights import load_sam
from loop.types import Selection

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
MB = 10**6


def prepare(context: LoopContext, selections: Sequence[Selection], progress: Progress | None = None) -> int:
    """Puts the encoded images of a batch where the backend looks for them; returns how many were encoded now.

    What is encoded is the PNG that Label Studio shows, under the hash of its bytes, as the backend does it. The last
    image of the batch comes first: the backend, while nobody clicks, begins with the first one at the same time, so
    that the two meet in the middle. An image that cannot be encoded is named in the log and left to the click.

    Args:
        context: the project.
        selections: the batch.
        progress: called as progress(done, total) after each image.

    Returns:
        0 where clicks are answered by the champion (`click.model`), nothing is kept on disk (`click.store_mb`), or SAM
        has no weights that can be used; the log says which.
    """
    config = context.config
    if config.click.model == "champion" or not config.click.store_mb or not selections:
        logger.info("no image of %s is encoded for clicks: click.model or click.store_mb say so", context.project_name)
        return 0
    weights = config.pseudo.sam
    try:
        sam = load_sam(weights.kind, weights.checkpoint, device=config.train.device)
    except CheckpointError as error:
        level = logging.WARNING if config.click.model == "sam" else logging.INFO
        logger.log(level, "no image of %s is encoded for clicks: %s", context.project_name, error)
        return 0
    store = EmbeddingStore(context.workspace.embeddings_dir, config.click.store_mb * MB)
    order = sorted(selections, key=lambda selection: selection.rank, reverse=True)
    count = 0
    for done, selection in enumerate(order, start=1):
        try:
            count += _encode(context, selection.image_id, sam, store)
        except LoopError as error:
            logger.warning("%s is not encoded for clicks: %s", selection.image_id, error)
        if progress is not None:
            progress(done, len(order))
    logger.info("%d of %d images of %s encoded for clicks", count, len(order), context.project_name)
    return count


def _encode(context: LoopContext, image_id: str, sam: Sam, store: EmbeddingStore) -> bool:
    """Whether the image had to be encoded and is kept now.

    Raises:
        ImageError: what Label Studio shows of it is missing or cannot be read.
        NonFiniteError: the encoder gives NaN for it, or what half precision cannot hold.
    """
    path = display_path(context, image_id)
    sha256 = file_sha256(path)
    if store.get(sha256, sam.version) is not None:  # read, so that it is whole and not the next one to go
        return False
    return store.put(sha256, sam.version, sam.encode(to_encode(read_image(path).pixels)).to_arrays())
