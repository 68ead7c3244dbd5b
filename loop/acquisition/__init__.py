"""Ways of choosing the next images by name: `ACQUISITIONS[strategy](candidates, k, rng)`."""

from loop.acquisition import (
    badge,
    celloop,
    core_set,
    cover,
    foreground_random,
    per_minute,
    power,
    random,
    top_k,
    typical,
    uncertain_diverse,
    weighted_kmeans,
)
from loop.acquisition.base import Acquisition

ACQUISITIONS: dict[str, Acquisition] = {
    "celloop": celloop.select,
    "random": random.select,
    "foreground_random": foreground_random.select,
    "entropy": top_k.by("entropy"),
    "margin": top_k.by("margin"),
    "bald": top_k.by("bald"),
    "disagreement": top_k.by("disagreement"),
    "power_entropy": power.select,
    "core_set": core_set.select,
    "typical": typical.select,
    "cover": cover.select,
    "badge": badge.select,
    "weighted_kmeans": weighted_kmeans.select,
    "per_minute": per_minute.select,
    "uncertain_diverse": uncertain_diverse.select,
}
