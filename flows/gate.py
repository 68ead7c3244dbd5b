"""Step 4: challenger against champion on the hold-out; promote, or refuse with a written reason."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flows.context import LoopContext
from flows.predict import predict_images
from loop.adapters.mlflow_registry import ModelVersion
from loop.metrics.instance import evaluate, image_ap
from loop.metrics.paired import paired_bootstrap
from loop.types import Instances, Sample

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
    decision = _decide(context, version, champion, holdout)
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


def _decide(
    context: LoopContext, version: ModelVersion, champion: ModelVersion | None, holdout: Sequence[Sample]
) -> Decision:
    """Both models measured on the hold-out images that both could predict."""
    predicted = _predicted(context, version, holdout)
    if champion is None:
        measured = [s for s in holdout if s.image.image_id in predicted]
        metrics = _metrics(predicted, measured)
        return Decision("first", f"{version.label} is the first model of the project", metrics)
    before = _predicted(context, champion, holdout)
    measured = [s for s in holdout if s.image.image_id in predicted and s.image.image_id in before]
    metrics = _metrics(predicted, measured)
    settings = context.config.gate
    if len(measured) < settings.min_images:
        reason = (
            f"the hold-out has {len(measured)} labelled images, fewer than {settings.min_images}: "
            f"nothing can be said; {champion.label} stays"
        )
        return Decision("refused", reason, metrics)
    champion_ap = _metrics(before, measured)["ap"]
    interval = paired_bootstrap(
        np.asarray([image_ap(predicted[s.image.image_id], s.instances) for s in measured]),
        np.asarray([image_ap(before[s.image.image_id], s.instances) for s in measured]),
        confidence=settings.confidence,
        resamples=settings.resamples,
        rng=np.random.default_rng(0),
    )
    metrics |= {"champion_ap": champion_ap, "gain": interval.mean, "low": interval.low, "high": interval.high}
    sentence = (
        f"AP on {len(measured)} hold-out images {metrics['ap']:.3f} against {champion_ap:.3f} of {champion.label}; "
        f"mean gain per image {interval.mean:+.3f}, {settings.confidence:.0%} interval "
        f"{interval.low:+.3f} to {interval.high:+.3f}, needed above {settings.margin:+.3f}"
    )
    if interval.low > settings.margin:
        return Decision("promoted", f"{version.label} is better: {sentence}", metrics)
    return Decision(
        "refused", f"{version.label} is not shown to be better: {sentence}; {champion.label} stays", metrics
    )


def _predicted(context: LoopContext, version: ModelVersion, holdout: Sequence[Sample]) -> dict[str, Instances]:
    found = predict_images(context, version, [sample.image for sample in holdout])
    missing = sorted({s.image.image_id for s in holdout} - set(found))
    if missing:
        logger.warning("%s could not predict the hold-out images %s; not measured", version.label, ", ".join(missing))
    return {image_id: prediction.instances for image_id, prediction in found.items()}


def _metrics(predicted: Mapping[str, Instances], measured: Sequence[Sample]) -> dict[str, Any]:
    if not measured:
        return {"ap": 0.0, "ap50": 0.0, "n_images": 0}
    modalities = [s.image.modality for s in measured]
    pairs = [(predicted[s.image.image_id], s.instances) for s in measured]
    return evaluate(pairs, modalities=modalities if all(modalities) else None)
