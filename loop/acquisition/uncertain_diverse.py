"""Images of which the model is unsure and that are unlike each other and unlike what it has learnt from."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loop.acquisition.base import check_candidates, standing
from loop.acquisition.large import select_large
from loop.types import Candidate, FloatArray, Selection


def select(
    candidates: Sequence[Candidate],
    k: int,
    rng: np.random.Generator,
    *,
    labelled: Sequence[FloatArray] = (),
) -> list[Selection]:
    """min(k, N) images, one after the other by uncertainty times distance; see `loop.acquisition.base.Acquisition`.

    Embeddings are standardised over the candidates. Where nothing is labelled the first image is the most uncertain
    one. Each further one has the highest product of u, its uncertainty as a share of the highest of all, and d, its
    distance to the nearest image that is chosen already or labelled. Equal products (all embeddings alike: d = 0 for
    all) go by uncertainty, then by image id. Nothing is random. Pools of a million are no obstacle: see
    `loop.acquisition.large`.

    Source: the greedy k-centre rule of Sener and Savarese 2018 (Core-Set), eq. 3. Differs: times uncertainty.
    """
    ordered = check_candidates(candidates, k, labelled)
    if not ordered or k == 0:
        return []
    uncertainty = np.array([c.uncertainty for c in ordered], dtype=np.float64)
    chosen = select_large(np.stack([c.embedding for c in ordered]), uncertainty, k, labelled=labelled)
    return [
        Selection(
            ordered[row].image_id, rank, False, _reason(uncertainty, row, spread, known=rank > 1 or bool(labelled))
        )
        for rank, (row, spread) in enumerate(zip(chosen.rows.tolist(), chosen.spread.tolist(), strict=True), start=1)
    ]


def _reason(uncertainty: npt.NDArray[np.float64], row: int, spread: float, *, known: bool) -> str:
    sure = f"uncertainty {uncertainty[row]:.3f}"
    if not known:
        return f"the model is least sure of its cells here among {len(uncertainty)} open images ({sure})"
    likeness = "unlike" if spread > 0.5 else "somewhat unlike" if spread > 0 else "much like"
    more = standing(uncertainty, row, "more uncertain")
    return f"{more} ({sure}) and {likeness} what is labelled or chosen before it"
