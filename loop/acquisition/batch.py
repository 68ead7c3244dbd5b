"""The next batch: what a strategy chooses to teach with, and a random share that measures."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from loop.acquisition import ACQUISITIONS
from loop.acquisition.base import check_candidates
from loop.acquisition.spaced import select_spaced
from loop.errors import ConfigError, InputError
from loop.types import Candidate, FloatArray, Selection

CONTROL_REASON = "drawn at random to measure the model; it never teaches it"
FIRST_REASON = "drawn at random: there is no model yet to ask"
QUICK_REASON = "quick, so it comes first"

BY_CHANCE = frozenset(["random", "foreground_random"])
"""What other ways are compared with stays as it is: chance also draws near-duplicates."""

SPACED = frozenset(["celloop"])
"""What keeps near-duplicates apart by itself."""

Groups = Mapping[str, Sequence[str]]


def choose_batch(
    candidates: Sequence[Candidate],
    *,
    k: int,
    control_share: float,
    strategy: str,
    rng: np.random.Generator,
    used_groups: AbstractSet[str],
    control_groups: AbstractSet[str] = frozenset(),
    labelled: Sequence[FloatArray] = (),
    quick_first: int = 0,
) -> list[Selection]:
    """min(k, N) images in the order in which people shall see them, ranked from 1.

    round(min(k, N) x control_share) of them are control images, drawn at random whatever the model says: groups without
    replacement, each with a chance proportional to its number of open images, and one image of each; when all groups
    are drawn, further images of the drawn ones. A group that teaches (`used_groups`) gives no control image, and a
    group with a control image, from this batch or an earlier one, gives no image to teach with; one that has done both
    gives neither. A group is not drawn where too few images would be left to teach with for the rest of the batch (for
    the first group: none), so a pool of one group is all taught and has no control.

    The rest is chosen by `strategy` among the images that may teach, near-duplicates not together (`select_spaced`)
    unless it goes by chance; where these are too few, control images drawn at random fill the batch. An image without
    a group is a group of its own, named by its id.

    Of the chosen images the `quick_first` of least expected seconds stand at the head, the quickest first, so that a
    person sees a result soon; one whose seconds are not known is none of them. Control images never are: whoever stops
    early would measure on easy images alone. They stand evenly between the rest, which keeps the strategy's order.

    Args:
        candidates: the open images; their order does not matter.
        k: size of the batch, >= 0.
        control_share: in [0, 1].
        strategy: a name in ACQUISITIONS.
        rng: the only source of randomness.
        used_groups: groups (or ids of images without one) that have taught a model.
        control_groups: groups (or ids) that have a control image already.
        labelled: embeddings of images that have taught, for the strategy.
        quick_first: how many images come first because they are quick, >= 0.

    Raises:
        ConfigError: the strategy is unknown.
        InputError: k, control_share or quick_first is out of range, or an image occurs twice.
        NonFiniteError: a candidate's uncertainty or embedding is NaN or infinite; the text names the image.
    """
    if strategy not in ACQUISITIONS:
        raise ConfigError(f"strategy {strategy!r} is unknown; choose from {', '.join(sorted(ACQUISITIONS))}")
    if quick_first < 0:
        raise InputError(f"quick_first={quick_first}; expected 0 or more images")
    ordered = check_candidates(candidates, k)
    groups = _by_group([(c.image_id, c.group) for c in ordered])
    n_control = _n_control(min(k, len(ordered)), control_share)
    n_teach = min(k, len(ordered)) - n_control
    control, teaching = _split(groups, n_control, n_teach, used_groups, control_groups, rng)
    eligible = [c for c in ordered if c.image_id in teaching]
    way, n = ACQUISITIONS[strategy], k - len(control)
    if strategy in BY_CHANCE | SPACED:
        chosen = way(eligible, n, rng, labelled=labelled)
    else:
        chosen = select_spaced(way, eligible, n, rng, labelled=labelled)
    barred = {s.image_id for s in chosen} | set(control) | teaching
    spare = [i for name in groups if name not in used_groups for i in groups[name] if i not in barred]
    control += _draw(spare, k - len(chosen) - len(control), rng)
    quick, rest = _quickest(chosen, {c.image_id: c.seconds for c in ordered}, quick_first)
    together = [*quick, *_spread(rest, control)]
    return [Selection(s.image_id, rank, s.control, s.reason) for rank, s in enumerate(together, start=1)]


def first_batch(
    images: Sequence[tuple[str, str]],
    k: int,
    control_share: float,
    rng: np.random.Generator,
    *,
    used_groups: AbstractSet[str] = frozenset(),
    control_groups: AbstractSet[str] = frozenset(),
    strategy: str = "random",
    embeddings: Mapping[str, FloatArray] | None = None,
    labelled: Sequence[FloatArray] = (),
) -> list[Selection]:
    """min(k, N) images before there is a model; control images as in `choose_batch`, the rest by `strategy`.

    No uncertainty is known then, so a strategy can go by the embeddings alone, e.g. statistics of texture.

    Args:
        images: (image id, group) of the open images; group "" = a group of its own.
        k: size of the batch, >= 0.
        control_share: share that measures and never teaches, in [0, 1].
        rng: the only source of randomness.
        used_groups: groups (or ids of images without one) that are labelled to teach.
        control_groups: groups (or ids) that have a control image already.
        strategy: a name in ACQUISITIONS.
        embeddings: (D,) float32 by image id, of every image; None = all alike, which only "random" does not mind.
        labelled: embeddings of images that are labelled to teach, for the strategy.

    Raises:
        ConfigError: the strategy is unknown.
        InputError: k or control_share is out of range, an image occurs twice, or has no embedding.
        NonFiniteError: an embedding is NaN or infinite; the text names the image.
    """
    alike = np.zeros(1, np.float32)
    missing = [image_id for image_id, _ in images if embeddings is not None and image_id not in embeddings]
    if missing:
        raise InputError(
            f"no embedding of {len(missing)} images ({', '.join(missing[:5])}); give one, or leave them out"
        )
    candidates = [
        Candidate(image_id, group, 0.0, alike if embeddings is None else embeddings[image_id])
        for image_id, group in images
    ]
    batch = choose_batch(
        candidates,
        k=k,
        control_share=control_share,
        strategy=strategy,
        rng=rng,
        used_groups=used_groups,
        control_groups=control_groups,
        labelled=labelled,
    )
    if strategy != "random":
        return batch
    return [Selection(s.image_id, s.rank, s.control, s.reason if s.control else FIRST_REASON) for s in batch]


def _n_control(k: int, control_share: float) -> int:
    if not 0 <= control_share <= 1:
        raise InputError(f"control_share={control_share}; expected 0 to 1")
    return int(k * control_share + 0.5)


def _by_group(images: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for image_id, group in sorted(images):
        groups[group or image_id].append(image_id)
    return dict(sorted(groups.items()))


def _split(
    groups: Groups,
    n_control: int,
    n_teach: int,
    used: AbstractSet[str],
    measuring: AbstractSet[str],
    rng: np.random.Generator,
) -> tuple[list[str], set[str]]:
    """The control images drawn, and all images that may still teach."""
    closed = set(measuring)
    control: list[str] = []
    drawable = [name for name in groups if name not in used]
    while len(control) < n_control and drawable:
        sizes = np.array([len(groups[name]) for name in drawable], dtype=np.float64)
        name = drawable.pop(int(rng.choice(len(drawable), p=sizes / sizes.sum())))
        left = sum(len(groups[other]) for other in groups if other not in closed and other != name)
        if name not in closed and left < (n_teach if control else min(n_teach, 1)):
            continue
        closed.add(name)
        control.append(groups[name][int(rng.integers(len(groups[name])))])
    drawn = set(control)
    spare = [i for name in groups if name in closed and name not in used for i in groups[name] if i not in drawn]
    control += _draw(spare, n_control - len(control), rng)
    return control, {i for name in groups if name not in closed for i in groups[name]}


def _draw(images: Collection[str], n: int, rng: np.random.Generator) -> list[str]:
    ordered = sorted(images)
    return [ordered[int(i)] for i in rng.permutation(len(ordered))[: max(n, 0)]]


def _quickest(
    chosen: Sequence[Selection], seconds: Mapping[str, float], n: int
) -> tuple[list[Selection], list[Selection]]:
    """The n chosen images of least known seconds, the quickest first, and the rest in their order."""
    timed = sorted((s for s in chosen if seconds[s.image_id] > 0), key=lambda s: (seconds[s.image_id], s.rank))
    ids = {s.image_id for s in timed[:n]}
    quick = [Selection(s.image_id, s.rank, False, f"{s.reason}; {QUICK_REASON}") for s in timed[:n]]
    return quick, [s for s in chosen if s.image_id not in ids]


def _spread(chosen: Sequence[Selection], control: Sequence[str]) -> list[Selection]:
    """Both together, ranked from 1: control image j of c stands at place (j + 1) x total // (c + 1), from 0."""
    total = len(chosen) + len(control)
    places = {(j + 1) * total // (len(control) + 1): image_id for j, image_id in enumerate(control)}
    order = iter(chosen)
    batch = []
    for place in range(total):
        if place in places:
            batch.append(Selection(places[place], place + 1, True, CONTROL_REASON))
        else:
            selection = next(order)
            batch.append(Selection(selection.image_id, place + 1, False, selection.reason))
    return batch


def control_count(k: int, control_share: float, rng: np.random.Generator) -> int:
    """How many of k images are control: k x control_share, a fraction of an image drawn by chance.

    So that a batch of two with a share of a fifth has a control image in two rounds of five, and not never.

    Raises:
        InputError: control_share is out of range.
    """
    if not 0 <= control_share <= 1:
        raise InputError(f"control_share={control_share}; expected 0 to 1")
    whole, rest = divmod(k * control_share, 1)
    return int(whole) + int(rng.random() < rest)
