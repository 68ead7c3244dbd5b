"""What a round says of its own worth: the live AP, what choosing images gains over random ones, what more would bring.

The document is kept as metrics["estimate"] of the round in the index:

    round, images (labelled hold-out), teaching, cells,
    minutes (people's work so far), modelled (the minutes are not measured)
    live        {ap, low, high, images, model} of the champion; None without one
    learnt      the same of the model that this round trained on people's labels alone; None where it is not given
    agreement   {f1, images}: that model against the champion of before, on open images; None without any
    gain        {mean, low, high, images, steps, folds, round}, the newest there is; or {reason}
    forecast    {mean, low, high, images, points, minutes, an_hour}; or {reason}
    advice      {kind, text} of flows/advice.py

AP here is the mean over the images of image_ap, in [0, 1]; intervals are of `gate.confidence`.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flows.advice import Figures, advise
from flows.against_random import against_random, work_seconds
from flows.context import LoopContext, image_ref
from flows.freeze import Frozen, newest_annotations
from flows.predict import predict_images
from loop.adapters.index import AnnotationRow
from loop.adapters.mlflow_registry import ModelVersion
from loop.config import LoopConfig
from loop.data.predictions import PredictionStore
from loop.errors import InputError, NonFiniteError
from loop.metrics.gain import bootstrap_mean, standard_error
from loop.metrics.instance import image_ap
from loop.metrics.learning_curve import fit_learning_curve, forecast
from loop.metrics.paired import Interval
from loop.metrics.stopping import agreement, gain_an_hour, is_budget_spent, is_stable

logger = logging.getLogger(__name__)

Document = dict[str, Any]
Progress = Callable[[int, int], None]

STOP_SET = 24
"""So many open images, always the same while they are open, are what successive models are compared on."""


def estimate(
    context: LoopContext,
    number: int,
    frozen: Frozen,
    champion: ModelVersion | None,
    *,
    learnt: ModelVersion | None = None,
    progress: Progress | None = None,
) -> Document:
    """The document of a round, made after its gate; the module's text lists its keys.

    The hold-out is drawn at random and never teaches, so its mean is unbiased for the open images, but for what the
    gate has picked the champion by: of two or three models the one that is better on these very images. Models of
    random images are trained (`against_random`: 4 x `estimate.share` of a training) in the first round that can and
    then every `estimate.every` rounds. Made again for the same round it gives the same.

    Args:
        context: the project.
        number: the round; earlier ones are read, later ones never.
        frozen: its labels.
        champion: the model in service after the gate.
        learnt: the model that this round trained on people's labels alone; its AP over the rounds is the learning
            curve, since the champion's stands still wherever a gate refuses.
        progress: called as progress(done, total) over the models of the comparison.

    Raises:
        ServiceError, CheckpointError: a model cannot be fetched or loaded.
        OSError: the figures cannot be kept.
    """
    settings = context.config
    annotations = newest_annotations(context.index.annotations(context.project_name), settings.labels.several)
    samples = frozen.snapshot.split("train") + frozen.holdout
    work = work_seconds(samples, annotations, settings.effort)
    earlier = _earlier(context, number)
    document: Document = {
        "round": number,
        "images": len(frozen.holdout),
        "teaching": len(frozen.train),
        "cells": sum(len(sample.instances) for sample in samples),
        "minutes": sum(work.seconds.values()) / 60,
        "modelled": not work.measured,
        "live": _live(context, frozen, champion),
        "learnt": _live(context, frozen, learnt),
        "agreement": _agreement(context, number, learnt),
        "gain": _gain(context, frozen, annotations, earlier, number=number, progress=progress),
    }
    document["forecast"] = _forecast(settings, [*earlier, document])
    document["advice"] = advise(_figures(settings, [*earlier, document]))._asdict()
    logger.info("estimate of round %d of %s: %s", number, context.project_name, document["advice"]["text"])
    return document


def interval_of(found: Mapping[str, Any] | None) -> Interval | None:
    """The interval in a part of a document; None where it holds a reason in its place."""
    if not found or "mean" not in found:
        return None
    return Interval(found["mean"], found["low"], found["high"])


def _earlier(context: LoopContext, number: int) -> list[Document]:
    """The documents of the rounds before, the oldest first."""
    rounds = [row for row in context.index.rounds(context.project_name) if row.number < number]
    return [row.metrics["estimate"] for row in rounds if row.metrics.get("estimate")]


def _live(context: LoopContext, frozen: Frozen, version: ModelVersion | None) -> Document | None:
    """The mean AP of a model on the hold-out images that it could predict."""
    if version is None:
        return None
    found = predict_images(context, version, [sample.image for sample in frozen.holdout], again=False)
    measured = [sample for sample in frozen.holdout if sample.image.image_id in found]
    if not measured:
        return None
    scores = np.array([image_ap(found[s.image.image_id].instances, s.instances) for s in measured])
    groups = [s.image.group or s.image.image_id for s in measured]
    settings = context.config.gate
    interval = bootstrap_mean(
        scores, groups, confidence=settings.confidence, resamples=settings.resamples, rng=np.random.default_rng(0)
    )
    return {
        "ap": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "images": len(measured),
        "model": version.label,
    }


def _agreement(context: LoopContext, number: int, learnt: ModelVersion | None) -> Document | None:
    """How far the new model finds the cells that the champion of before found in the same open images."""
    row = next((row for row in context.index.rounds(context.project_name) if row.number == number), None)
    if learnt is None or row is None or row.champion_before in ("", learnt.label):
        return None
    store = PredictionStore(context.workspace.predictions_dir, row.champion_before)
    images = [image for image in context.index.images(context.project_name) if image.state == "open"]
    images.sort(key=lambda image: hashlib.sha256(image.image_id.encode()).hexdigest())
    refs = [image_ref(image) for image in images[:STOP_SET]]
    before = {ref.image_id: stored for ref in refs if (stored := store.load(ref)) is not None}
    try:
        after = predict_images(context, learnt, [ref for ref in refs if ref.image_id in before], again=False)
    except (InputError, NonFiniteError) as error:
        logger.warning("%s is not compared with %s: %s", learnt.label, row.champion_before, error)
        return None
    if not after:
        return None
    f1 = agreement([before[name].instances for name in after], [after[name].instances for name in after])
    return {"f1": f1, "images": len(after)}


def _gain(
    context: LoopContext,
    frozen: Frozen,
    annotations: Mapping[str, AnnotationRow],
    earlier: Sequence[Document],
    *,
    number: int,
    progress: Progress | None,
) -> Document:
    """The gain over random images: made anew where it is due, else the last one; or why there is none."""
    every = context.config.estimate.every
    if every == 0:
        return {"reason": "it is switched off (estimate.every is 0)"}
    last: Document | None = next((doc["gain"] for doc in reversed(earlier) if interval_of(doc["gain"])), None)
    if context.config.select.strategy == "random":
        last = None  # what was measured of another strategy says nothing of this one
    if last is not None and number - last["round"] < every:
        return last
    try:
        found = against_random(context, frozen, annotations, progress)
    except (InputError, NonFiniteError) as error:
        logger.warning("no models of random images in round %d of %s: %s", number, context.project_name, error)
        found = {"reason": f"the models could not be compared: {error}"}
    if "reason" in found:
        return last or found
    return {**found, "round": number}


def _forecast(config: LoopConfig, documents: Sequence[Document]) -> Document:
    """What `estimate.ahead_images` more images would bring, from the models of all rounds so far, each of them once."""
    settings, control = config.estimate, config.select.control
    points = [(doc["teaching"], doc["learnt"] or doc["live"]) for doc in documents if doc["learnt"] or doc["live"]]
    measured = {(cost, found["model"]): found for cost, found in points if cost > 0 and found["images"] >= 3}
    points = [(cost, found) for (cost, _), found in measured.items()]
    curve = fit_learning_curve(
        [cost for cost, _ in points],
        [found["ap"] for _, found in points],
        [standard_error(found["low"], found["high"], config.gate.confidence) for _, found in points],
        rng=np.random.default_rng(0),
    )
    more = settings.ahead_images
    interval = forecast(curve, more * (1 - control), confidence=config.gate.confidence)
    if interval is None:
        return {"reason": "models of three different amounts of labels are needed"}
    now = documents[-1]
    seconds = 60 * now["minutes"] / max(now["images"] + now["teaching"], 1) * more
    an_hour = gain_an_hour(interval, seconds)
    return {
        **interval._asdict(),
        "images": more,
        "points": len(points),
        "minutes": seconds / 60,
        "an_hour": an_hour.mean if an_hour is not None else None,
    }


def _figures(config: LoopConfig, documents: Sequence[Document]) -> Figures:
    now, settings = documents[-1], config.estimate
    ahead = interval_of(now["forecast"])
    compared = [doc for doc in documents if doc["agreement"]]
    agreements = {(doc["learnt"] or {}).get("model", doc["round"]): doc["agreement"]["f1"] for doc in compared}
    return Figures(
        holdout=now["images"],
        min_images=settings.min_images,
        worth=settings.worth_ap,
        ahead_images=settings.ahead_images,
        forecast=ahead,
        an_hour=gain_an_hour(ahead, 60 * now["forecast"]["minutes"]) if ahead is not None else None,
        gain=interval_of(now["gain"]),
        no_gain=now["gain"].get("reason", ""),
        stable=is_stable(list(agreements.values())),
        budget_spent=is_budget_spent(now["minutes"], settings.budget_minutes),
        modelled=now["modelled"],
    )
