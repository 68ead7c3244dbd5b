"""Open images that cannot be chosen, because their file is gone or the model could not look at them; always named."""

from collections.abc import Collection, Sequence
from pathlib import Path

from flows.context import LoopContext
from loop.adapters.index import ImageRow

FILE_GONE = "its file is gone from storage: nothing to do here"
NOT_SEEN = "the model could not look at this image: is it of use? If not, call it unusable"


def vanished(rows: Sequence[ImageRow]) -> list[ImageRow]:
    """The open images of `rows` whose file is not where it was, in their order."""
    return [row for row in rows if row.state == "open" and not Path(row.path).is_file()]


def unseen(rows: Sequence[ImageRow], seen: Collection[str]) -> list[ImageRow]:
    """The open images of `rows` without a prediction, in their order.

    Args:
        rows: images.
        seen: ids of the images that have a prediction; none at all = there is no model yet, and no image lacks one.
    """
    return [row for row in rows if seen and row.state == "open" and row.image_id not in seen]


def absent_lines(context: LoopContext, seen: Collection[str]) -> tuple[str, ...]:
    """What a round has to say of the open images that it could not choose, one line a cause; `seen` as in `unseen`."""
    rows = context.index.images(context.project_name, state="open")
    gone = vanished(rows)
    lost = {row.image_id for row in gone}
    blind = unseen([row for row in rows if row.image_id not in lost], seen)
    lines = []
    if gone:
        lines.append(f"{named(gone)}: the file is gone, so not chosen; put it back and run `celloop init` again")
    if blind:
        lines.append(f"{named(blind)}: no prediction, so not chosen; the log says why")
    return tuple(lines)


def named(rows: Sequence[ImageRow]) -> str:
    """The ids of the first ten, and how many more there are."""
    more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
    return ", ".join(row.image_id for row in rows[:10]) + more
