"""Step 4: challenger against champion on the hold-out; promote, or refuse with a written reason."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flows.context import LoopContext
from flows.predict import predict_images
from loop.adapters.mlflow_registry import ModelVersion
from loop.metrics.instance import evaluate, image_ap
from loop.metrics.paired import paired_bootstrap
from loop.types import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """What the gate decided: "first", "promoted" or "refused", why, and the numbers behind it."""

    outcome: str
    reason: str
    metrics: dict[str, Any] = field(default_factory=dict)


def gate(context: LoopContext, version: ModelVersion, holdout: Sequence[Sample]) -> Decision:
    """Lets `version` replace the champion only if it is better on the hold-out.

    Better: the lower end of the paired bootstrap interval of the mean difference in per-image AP lies above
    `gate.margin`. The numbers and the sentence are kept in the model version's tags. Asked again for the same
    version on the same hold-out, it decides the same. A model that a person rolled back does not come back.
    """
    champion = context.registry.champion()
    if champion is not None and champion.version == version.version:
        return _decided(champion)
    if champion is not None and version.decision == "rolled back":
        reason = (
            f"{version.label} was rolled back ({version.reason}); {champion.label} stays until there are new labels"
        )
        return Decision("refused", reason, version.metrics)
    context.registry.set_challenger(version)
    metrics, aps = _measure(context, version, holdout)
    if champion is None:
        decision = Decision("first", f"{version.label} is the first model of the project", metrics)
    else:
        decision = _compare(context, version, champion, holdout, metrics, aps)
    flat = {key: value for key, value in decision.metrics.items() if isinstance(value, int | float)}
    if decision.outcome == "refused":
        context.registry.refuse(version, decision.reason, flat)
    else:
        context.registry.promote(version, decision.reason, flat)
    logger.info("gate of %s: %s (%s)", context.project_name, decision.outcome, decision.reason)
    return decision


def _decided(champion: ModelVersion) -> Decision:
    """What an earlier, interrupted try decided of the model that is the champion now."""
    if champion.decision != "promoted":
        return Decision("none", f"{champion.label} is the champion already", champion.metrics)
    return Decision("promoted" if "champion_ap" in champion.metrics else "first", champion.reason, champion.metrics)


def _compare(
    context: LoopContext,
    version: ModelVersion,
    champion: ModelVersion,
    holdout: Sequence[Sample],
    metrics: dict[str, Any],
    aps: list[float],
) -> Decision:
    settings = context.config.gate
    if len(holdout) < settings.min_images:
        reason = (
            f"the hold-out has {len(holdout)} labelled images, fewer than {settings.min_images}: "
            f"nothing can be said; {champion.label} stays"
        )
        return Decision("refused", reason, metrics)
    before, aps_before = _measure(context, champion, holdout)
    interval = paired_bootstrap(
        np.asarray(aps),
        np.asarray(aps_before),
        confidence=settings.confidence,
        resamples=settings.resamples,
        rng=np.random.default_rng(0),
    )
    metrics = {
        **metrics,
        "champion_ap": before["ap"],
        "gain": interval.mean,
        "low": interval.low,
        "high": interval.high,
    }
    better = interval.low > settings.margin
    sentence = (
        f"AP on {len(holdout)} hold-out images {metrics['ap']:.3f} against {before['ap']:.3f} of {champion.label}; "
        f"mean gain per image {interval.mean:+.3f}, {settings.confidence:.0%} interval "
        f"{interval.low:+.3f} to {interval.high:+.3f}, needed above {settings.margin:+.3f}"
    )
    if better:
        return Decision("promoted", f"{version.label} is better: {sentence}", metrics)
    return Decision(
        "refused", f"{version.label} is not shown to be better: {sentence}; {champion.label} stays", metrics
    )


def _measure(
    context: LoopContext, version: ModelVersion, holdout: Sequence[Sample]
) -> tuple[dict[str, Any], list[float]]:
    """Metrics of one model on the hold-out and its AP on each image."""
    predicted = predict_images(context, version, [sample.image for sample in holdout])
    pairs = [(predicted[s.image.image_id].instances, s.instances) for s in holdout]
    modalities = [s.image.modality for s in holdout]
    metrics = evaluate(pairs, modalities=modalities if all(modalities) else None) if pairs else {"ap": 0.0}
    return metrics, [image_ap(prediction, truth) for prediction, truth in pairs]
