"""The effort ledger in words and rows, as the report page shows it."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from flows.context import LoopContext, registry_name
from flows.ledger import Ledger, read_ledger
from loop.effort.summary import Share, Summary
from loop.errors import LoopError

logger = logging.getLogger(__name__)

_EARLIER = 3  # so many versions before the newest are named in the sentence


def corrections(context: LoopContext) -> dict[str, Any] | None:
    """What the corrections say of each model, for the page; None before a model has offered anything.

    Returns:
        {"sentences": [...], "tables": [(title of the first column, rows)]}; rows are of `_row`. People are there where
        they are several, modalities likewise.
    """
    ledger = read_ledger(context)
    if not any(found.offered for found in ledger.by_version.values()):
        return None
    short = {label: _short(label, context.project_name) for label in ledger.by_version}
    tables = [("model", [_row(short[label], found) for label, found in ledger.by_version.items()])]
    if len(ledger.by_annotator) > 1:
        names = _names(context, ledger)
        tables.append(("annotator", [_row(names[key], found) for key, found in ledger.by_annotator.items()]))
    if len(ledger.by_modality) > 1:
        tables.append(("modality", [_row(key or "not given", found) for key, found in ledger.by_modality.items()]))
    return {"sentences": _sentences(ledger.by_version, short), "tables": tables}


def _short(label: str, project: str) -> str:
    """`v3` of this project's model; the whole label of anything else."""
    own = f"{registry_name(project)}-"
    return label.removeprefix(own)


def _sentences(versions: Mapping[str, Summary], short: Mapping[str, str]) -> list[str]:
    """The newest model's share of untouched cells beside earlier ones', and what else it cost."""
    told = [(short[label], found) for label, found in versions.items() if found.kept is not None]
    name, newest = told[-1]
    earlier = told[:-1][::-1][:_EARLIER]
    kept = newest.kept
    if kept is None:
        return []
    beside = ", ".join(f"{other}: {_percent(found.kept)}" for other, found in earlier)
    line = f"model {name}: {_percent(kept)} of cells kept untouched" + (f" ({beside})" if beside else "")
    before = earlier[0][1].kept if earlier else None
    if before is not None and before.low <= kept.high and kept.low <= before.high:
        line += f"; the intervals of {name} and {earlier[0][0]} overlap, so that may be chance"
    rest = [f"{_percent(newest.edited)} edited" + (f" (IoU {newest.edited_iou:.2f})" if newest.edited_iou else "")]
    rest.append(f"{_percent(newest.deleted)} deleted")
    if newest.added_per_image is not None:
        rest.append(f"{newest.added_per_image:.1f} added per image")
    if newest.seconds_per_cell is not None:
        rest.append(f"{newest.seconds_per_cell:.1f} s a cell")
    images = "1 image" if newest.images == 1 else f"{newest.images} images"
    return [f"{line}.", f"Of the {newest.offered} cells that {name} offered in {images}: {', '.join(rest)}."]


def _row(name: str, found: Summary) -> dict[str, Any]:
    """A row of a table, "" where there is no figure; `bar`: the kept and the edited percentage, None without cells."""
    kept, edited = found.kept, found.edited
    return {
        "name": name,
        "images": found.images,
        "offered": found.offered,
        "kept": f"{_percent(kept)} ({100 * kept.low:.0f} to {100 * kept.high:.0f})" if kept else "",
        "edited": _percent(edited),
        "edited_iou": "" if found.edited_iou is None else f"{found.edited_iou:.2f}",
        "deleted": _percent(found.deleted),
        "added": "" if found.added_per_image is None else f"{found.added_per_image:.1f}",
        "seconds": "" if found.seconds_per_cell is None else f"{found.seconds_per_cell:.1f}",
        "bar": (round(100 * kept.mean, 1), round(100 * edited.mean, 1)) if kept and edited else None,
    }


def _percent(found: Share | None) -> str:
    return "" if found is None else f"{100 * found.mean:.0f} %"


def _names(context: LoopContext, ledger: Ledger) -> dict[int | None, str]:
    """People by their e-mail, by their number where Label Studio does not say."""
    try:
        people = context.label_studio.people()
    except LoopError as error:
        logger.warning("the report of %s names people by number: %s", context.project_name, error)
        people = {}
    logins: dict[int, list[str]] = {}
    for login, number in people.items():
        logins.setdefault(number, []).append(login)
    return {key: _name(key, logins.get(key, []) if key is not None else []) for key in ledger.by_annotator}


def _name(number: int | None, logins: Sequence[str]) -> str:
    if number is None:
        return "not known"
    return next((login for login in logins if "@" in login), logins[0] if logins else f"person {number}")
