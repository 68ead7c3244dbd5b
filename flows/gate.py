"""Step 4: challengers against champion on the hold-out; promote, or refuse with a written reason."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from flows.context import LoopContext
from flows.predict import predict_images
from loop.adapters.mlflow_registry import ModelVersion
from loop.config import GateConfig
from loop.metrics.instance import evaluate, image_ap
from loop.metrics.paired import Interval, paired_bootstrap
from loop.types import Instances, Sample

logger = logging.getLogger(__name__)

PSEUDO_FIGURES = ("labelled_ap", "mixed_ap", "labelled_share", "pseudo_gain", "pseudo_low", "pseudo_high")
"""What a gate measures of pseudo-labels beside what it measures of the chosen challenger."""


@dataclass(frozen=True)
class Decision:
    """What the gate decided: "first", "promoted" or "refused", why, and the numbers behind it."""

    outcome: str
    reason: str
    metrics: dict[str, Any] = field(default_factory=dict)


def gate(
    context: LoopContext, version: ModelVersion, holdout: Sequence[Sample], mixed: ModelVersion | None = None
) -> Decision:
    """Lets the round's challenger replace the champion only if it is better on the hold-out.

    Better: the lower end of the paired bootstrap interval of the mean difference in per-image AP lies above
    `gate.margin`. Where there is a `mixed` challenger too, the one of the higher AP on the hold-out meets the champion,
    at equal AP the one without pseudo-labels. The numbers and the sentence are kept in the model version's tags. Asked
    again for the same versions on the same hold-out, it decides the same. A model that a person rolled back does not
    come back. Where one of the two is the champion already (the same labels under other settings), the other meets it.

    Args:
        context: the project.
        version: the challenger that people's labels alone have taught.
        holdout: the images to measure on.
        mixed: the challenger that pseudo-labels have taught too.
    """
    champion = context.registry.champion()
    versions = [version] if mixed is None else [version, mixed]
    others = [candidate for candidate in versions if champion is None or candidate.version != champion.version]
    if champion is not None and len(others) < len(versions) and all(_was_met(champion, other) for other in others):
        return _decided(champion)
    back = next((candidate for candidate in versions if candidate.decision == "rolled back"), None)
    if champion is not None and back is not None:
        reason = f"{back.label} was rolled back ({back.reason}); {champion.label} stays until there are new labels"
        return Decision("refused", reason, {k: v for k, v in back.metrics.items() if k not in PSEUDO_FIGURES})
    chosen, comparison = version, _Comparison({}, "")
    if mixed is not None:
        chosen, comparison = _better(context, version, mixed, holdout)
    if champion is not None and chosen.version == champion.version:
        return _stays(context, champion, others[0], holdout, comparison)
    context.registry.set_challenger(chosen)
    decision = _decide(context, chosen, champion, holdout, comparison)
    flat = _flat(decision.metrics)
    for loser in others:
        if loser.version != chosen.version:
            context.registry.refuse(loser, f"{chosen.label} met the champion: {comparison.sentence}", flat)
    if decision.outcome == "refused":
        context.registry.refuse(chosen, decision.reason, flat)
    else:
        context.registry.promote(chosen, decision.reason, flat)
    logger.info("gate of %s: %s (%s)", context.project_name, decision.outcome, decision.reason)
    return decision


class _Comparison(NamedTuple):
    """What pseudo-labels changed on the hold-out: the figures, and a sentence; empty where there were none."""

    metrics: dict[str, float]
    sentence: str


def _better(
    context: LoopContext, labelled: ModelVersion, mixed: ModelVersion, holdout: Sequence[Sample]
) -> tuple[ModelVersion, _Comparison]:
    """The challenger of the higher AP on the images that both could predict, and how they compare."""
    settings = context.config.gate
    alone, both = _predicted(context, labelled, holdout), _predicted(context, mixed, holdout)
    measured = [s for s in holdout if s.image.image_id in alone and s.image.image_id in both]
    if not measured:
        return labelled, _Comparison({}, "whether pseudo-labels help cannot be said without a hold-out image")
    labelled_ap, mixed_ap = (float(_metrics(found, measured)["ap"]) for found in (alone, both))
    interval = _interval(both, alone, measured, settings)
    metrics = {
        "labelled_ap": labelled_ap,
        "mixed_ap": mixed_ap,
        "labelled_share": context.config.pseudo.labelled_only,
        "pseudo_gain": interval.mean,
        "pseudo_low": interval.low,
        "pseudo_high": interval.high,
    }
    sentence = (
        f"{_verdict(interval, len(measured), settings)}: AP {mixed_ap:.3f} with them, {labelled_ap:.3f} without"
        f"{_handicap(context.config.pseudo.labelled_only)}, mean gain per image {interval.mean:+.3f}, "
        f"{settings.confidence:.0%} interval {interval.low:+.3f} to {interval.high:+.3f}"
    )
    return mixed if mixed_ap > labelled_ap else labelled, _Comparison(metrics, sentence)


def _verdict(interval: Interval, n: int, settings: GateConfig) -> str:
    """What the comparison shows, no more than its interval and the number of images allow."""
    if n >= settings.min_images and interval.low > 0:
        return "pseudo-labels helped"
    if n >= settings.min_images and interval.high < 0:
        return "pseudo-labels did harm"
    return "pseudo-labels are not shown to help"


def _handicap(share: float) -> str:
    """How the challenger without pseudo-labels was put at a disadvantage; "" = it was not."""
    return "" if share == 1 else f" (the one without had {share:.0%} of the training)"


def _flat(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if isinstance(value, int | float)}


def _was_met(champion: ModelVersion, other: ModelVersion) -> bool:
    """Whether both were decided of together, by an earlier try of the same gate."""
    return bool(other.decision) and other.metrics == champion.metrics


def _stays(
    context: LoopContext,
    champion: ModelVersion,
    other: ModelVersion,
    holdout: Sequence[Sample],
    comparison: _Comparison,
) -> Decision:
    """The champion, which learnt from the same people's labels before, is no worse than the new challenger."""
    predicted = _predicted(context, champion, holdout)
    metrics = _metrics(predicted, [s for s in holdout if s.image.image_id in predicted]) | comparison.metrics
    reason = f"{other.label} is not better than the champion {champion.label}, which stays; {comparison.sentence}"
    context.registry.refuse(other, reason, _flat(metrics))
    logger.info("gate of %s: refused (%s)", context.project_name, reason)
    return Decision("refused", reason, metrics)


def _interval(
    one: Mapping[str, Instances], other: Mapping[str, Instances], measured: Sequence[Sample], settings: GateConfig
) -> Interval:
    """The mean difference in per-image AP of two models' cells, with its bootstrap interval."""
    scores = [np.asarray([image_ap(found[s.image.image_id], s.instances) for s in measured]) for found in (one, other)]
    rng = np.random.default_rng(0)
    return paired_bootstrap(*scores, confidence=settings.confidence, resamples=settings.resamples, rng=rng)


def _decided(champion: ModelVersion) -> Decision:
    """What an earlier, interrupted try decided of the model that is the champion now."""
    if champion.decision != "promoted":
        return Decision("none", f"{champion.label} is the champion already", champion.metrics)
    return Decision("promoted" if "champion_ap" in champion.metrics else "first", champion.reason, champion.metrics)


def _decide(
    context: LoopContext,
    version: ModelVersion,
    champion: ModelVersion | None,
    holdout: Sequence[Sample],
    comparison: _Comparison,
) -> Decision:
    """Both models measured on the hold-out images that both could predict."""
    predicted = _predicted(context, version, holdout)
    aside = f"; {comparison.sentence}" if comparison.sentence else ""
    if champion is None:
        measured = [s for s in holdout if s.image.image_id in predicted]
        metrics = _metrics(predicted, measured) | comparison.metrics
        return Decision("first", f"{version.label} is the first model of the project{aside}", metrics)
    before = _predicted(context, champion, holdout)
    measured = [s for s in holdout if s.image.image_id in predicted and s.image.image_id in before]
    metrics = _metrics(predicted, measured) | comparison.metrics
    settings = context.config.gate
    if len(measured) < settings.min_images:
        reason = (
            f"the hold-out has {len(measured)} labelled images, fewer than {settings.min_images}: "
            f"nothing can be said; {champion.label} stays{aside}"
        )
        return Decision("refused", reason, metrics)
    champion_ap = _metrics(before, measured)["ap"]
    interval = _interval(predicted, before, measured, settings)
    metrics |= {"champion_ap": champion_ap, "gain": interval.mean, "low": interval.low, "high": interval.high}
    sentence = (
        f"AP on {len(measured)} hold-out images {metrics['ap']:.3f} against {champion_ap:.3f} of {champion.label}; "
        f"mean gain per image {interval.mean:+.3f}, {settings.confidence:.0%} interval "
        f"{interval.low:+.3f} to {interval.high:+.3f}, needed above {settings.margin:+.3f}"
    )
    if interval.low > settings.margin:
        return Decision("promoted", f"{version.label} is better: {sentence}{aside}", metrics)
    return Decision(
        "refused", f"{version.label} is not shown to be better: {sentence}; {champion.label} stays{aside}", metrics
    )


def _predicted(context: LoopContext, version: ModelVersion, holdout: Sequence[Sample]) -> dict[str, Instances]:
    found = predict_images(context, version, [sample.image for sample in holdout], again=False)
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
