"""Ways of choosing the next images by name: `ACQUISITIONS[strategy](candidates, k, rng)`."""

from loop.acquisition import random, uncertain_diverse
from loop.acquisition.base import Acquisition

ACQUISITIONS: dict[str, Acquisition] = {
    "random": random.select,
    "uncertain_diverse": uncertain_diverse.select,
}
