"""What a person should do next, in words, from what the rounds have measured.

`advise` takes the first of these rules that holds. `worth` is `estimate.worth_ap`; the forecast is what
`estimate.ahead_images` more images would bring, the gain that of the strategy over random images at equal cost; each
comes with a 90 % interval.

| advice | when |
|---|---|
| stop | the budget of people's time is spent |
| too early to say | fewer labelled hold-out images than `estimate.min_images` |
| stop | the whole interval of the forecast lies below `worth`; or its mean does and the models have stabilised |
| use random | the whole interval of the gain lies below `worth` |
| too early to say | there is no forecast: models of fewer than three amounts of labels |
| go on | the mean of the forecast is `worth` or more |
| too early to say | otherwise: the mean is below `worth`, its interval is not |

That the strategy pays is said only where the whole interval of the gain lies above 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from flows.context import LoopContext
from loop.adapters.index import ImageRow, RoundRow
from loop.metrics.paired import Interval

UNIT = "AP in points of 100"


class Advice(NamedTuple):
    """What to do, and the sentences that say so with the numbers behind it."""

    kind: Literal["stop", "use random", "go on", "too early"]
    text: str


@dataclass(frozen=True)
class Figures:
    """What the advice rests on; intervals in AP of 0 to 1.

    `gain` and `forecast` are None where they are not known; `no_gain` says why. `stable`: successive models agree.
    `modelled`: the time that is spent is reckoned from the cells, not measured.
    """

    holdout: int
    min_images: int
    worth: float
    ahead_images: int
    forecast: Interval | None = None
    an_hour: Interval | None = None
    gain: Interval | None = None
    no_gain: str = ""
    stable: bool = False
    budget_spent: bool = False
    modelled: bool = False


def advise(figures: Figures) -> Advice:
    """The advice; the module's text lists the rules."""
    kind, text = _rule(figures)
    return Advice(kind, f"{text} {_on_the_strategy(figures)}")


def next_step(context: LoopContext, images: Sequence[ImageRow], rounds: Sequence[RoundRow]) -> str:
    """What a person does now: label the queue, start a round, add images."""
    waiting = [row for row in images if row.state == "open" and row.rank is not None]
    if not any(row.state == "open" for row in images):
        return "Every image is labelled or set aside. Add images with `celloop init`, or export the masks."
    if waiting:
        where = "at the head of the queue (Label All Tasks in Label Studio)"
        if context.config.select.annotators:
            where = (
                "of the batch, each of you in his own tab of Label Studio (Batch for LOGIN, Label Tasks As Displayed)"
            )
        return (
            f"Label the {len(waiting)} images {where}; "
            f"a round starts by itself after {context.config.trigger.new_annotations} new annotations, "
            "or by hand with `celloop round`."
        )
    if rounds and rounds[-1].decision == "refused":
        return "The last model was refused; the champion stays in service. More labels decide: run `celloop round`."
    if rounds and not any(row.chosen_in == rounds[-1].number for row in images):
        return (
            "The last round could choose none of the open images: their files are gone or could not be read, or they "
            "are of a group of the hold-out. Put files back, or add images with `celloop init`, then run "
            "`celloop round`."
        )
    return "The batch is labelled. Run `celloop round`."


def _rule(figures: Figures) -> Advice:
    forecast, gain, worth = figures.forecast, figures.gain, figures.worth
    if figures.budget_spent:
        how = ", as reckoned from the cells (Label Studio has not measured all images)" if figures.modelled else ""
        return Advice("stop", f"stop: the time set aside for labelling is spent{how}.")
    if figures.holdout < figures.min_images:
        return Advice(
            "too early",
            f"too early to say: {figures.holdout} hold-out images are labelled, {figures.min_images} are needed.",
        )
    if forecast is not None and (forecast.high < worth or (forecast.mean < worth and figures.stable)):
        agree = "" if forecast.high < worth else "; successive models find the same cells"
        return Advice("stop", f"stop: {_ahead(figures, forecast)}{agree}.")
    if gain is not None and gain.high < worth:
        more = f"; {_ahead(figures, forecast)}" if forecast is not None else ""
        hardly = "hardly" if gain.low > 0 else "no"
        return Advice("use random", f"use random: the chosen images teach {hardly} more than random ones{more}.")
    if forecast is None:
        return Advice("too early", "too early to say: a forecast needs models of three amounts of labels.")
    if forecast.mean >= worth:
        return Advice("go on", f"go on: {_ahead(figures, forecast)}.")
    return Advice("too early", f"too early to say: {_ahead(figures, forecast)}, which may be worth it or not.")


def _ahead(figures: Figures, forecast: Interval) -> str:
    an_hour = f", {points(figures.an_hour.mean)} an hour" if figures.an_hour is not None else ""
    return f"{figures.ahead_images} more images would bring about {told(forecast)}{an_hour}"


def _on_the_strategy(figures: Figures) -> str:
    """What is known of the strategy against random images."""
    gain = figures.gain
    if gain is None:
        return f"Whether the choice of images beats random ones is not known: {figures.no_gain}."
    if gain.low > 0:
        return f"The choice of images pays: {told(gain)} over random ones at equal cost."
    if gain.high < 0:
        return f"The choice of images costs: {told(gain)} against random ones at equal cost."
    return f"The choice of images is not shown to beat random ones: {told(gain)} at equal cost."


def told(interval: Interval) -> str:
    """The interval in points of 100, as "+0.4 AP (-0.1 to +0.9, AP in points of 100)"."""
    return f"{points(interval.mean)} ({points(interval.low, '')} to {points(interval.high, '')}, {UNIT})"


def points(ap: float, unit: str = " AP") -> str:
    """A difference in AP of 0 to 1 as points of 100 with its sign."""
    text = f"{100 * ap:+.1f}"
    return ("+0.0" if text == "-0.0" else text) + unit
