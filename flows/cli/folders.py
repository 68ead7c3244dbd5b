"""Commands on plain folders, without services: train, predict, evaluate. Heavy imports wait for their command."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table

from flows.cli.console import Document, emit, run
from flows.cli.options import ConfigOption, JsonOption
from flows.cli.progress import telling
from loop.errors import InputError

SHOWN = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l", "f1", "pq", "aji", "dice", "iou", "count_error")


def train(
    data: Annotated[Path, typer.Option("--data", help="Dataset folder with images/ and labels/.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for model.safetensors and model.json.")],
    model: Annotated[str | None, typer.Option("--model", help="A name of loop/models.")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Training time.")] = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="A budget in steps, for runs that repeat.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")] = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Trains a model on a dataset folder, no services needed."""

    def work() -> None:
        from flows.folders import train_folder
        from loop.config import load_config

        overrides = {
            "model.name": model,
            "train.minutes": minutes,
            "train.max_steps": max_steps,
            "train.seed": seed,
            "train.device": device,
        }
        settings = load_config(config, overrides)
        budget = round(settings.train.minutes * 60)
        last: dict[str, float] = {}
        with telling() as tell:

            def log(step: int, values: dict[str, float]) -> None:
                last.update(steps=step, loss=values["loss"])
                if settings.train.max_steps:
                    tell("training (steps)", step, settings.train.max_steps)
                else:
                    tell("train", min(budget, round(values.get("seconds", 0.0))), budget)

            done = train_folder(data, out, settings, log)
        emit({**asdict(done), **last}, json=json, render=_summary)

    run(work, json=json)


def predict(
    model: Annotated[Path, typer.Option("--model", help="Folder of a model.")],
    images: Annotated[Path, typer.Option("--images", help="Folder of images.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")],
    formats: Annotated[str, typer.Option("--format", help="comma-separated: labels, coco, labelstudio")] = "labels",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    json: JsonOption = False,
) -> None:
    """Masks of a model for a folder of images."""

    def work() -> None:
        from flows.folders import predict_folder

        wanted = [part.strip() for part in formats.split(",") if part.strip()]
        with telling() as tell:
            done = predict_folder(model, images, out, wanted, device=device, tell=tell)
        emit(asdict(done), json=json, render=_summary)

    run(work, json=json)


def evaluate(
    pred: Annotated[Path, typer.Option("--pred", help="Folder that `predict --format labels` wrote.")],
    gt: Annotated[Path, typer.Option("--gt", help="Dataset folder, or folder of label images.")],
    json: JsonOption = False,
) -> None:
    """AP, F1, PQ, AJI, Dice, IoU and count error, whole and for each modality."""

    def work() -> None:
        from flows.folders import evaluate_folders

        for folder in (pred, gt):
            if not folder.is_dir():
                raise InputError(f"{folder} is no folder; give one that holds label images")
        emit(evaluate_folders(pred, gt), json=json, render=_metrics)

    run(work, json=json)


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to `app`."""
    app.command("train")(train)
    app.command("predict")(predict)
    app.command("evaluate")(evaluate)


def _summary(document: Document) -> Table:
    table = Table(show_header=False, box=None)
    for key, value in document.items():
        if key != "problems":
            table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    for problem in document["problems"]:
        table.add_row("left out", str(problem))
    return table


def _metrics(document: Document) -> Group:
    """A column for all images and one for each modality, so that it fits a terminal of 80 columns."""
    per = sorted(document.get("per", {}).items())
    table = Table("", "all", *(name for name, _ in per))
    table.add_row("images", str(document["n_images"]), *(str(figures["n_images"]) for _, figures in per))
    table.add_row("cells", str(document["n_gt"]), *(str(figures["n_gt"]) for _, figures in per))
    for key in SHOWN:
        name = key.replace("_", " ")
        table.add_row(name, _number(document[key]), *(_number(figures[key]) for _, figures in per))
    if per:
        table.add_row("mean AP of these", _number(document.get("macro_ap")))
    missing = document["missing"]
    if not missing["n"]:
        return Group(table)
    names = ", ".join(missing["images"]) + (", ..." if missing["n"] > len(missing["images"]) else "")
    return Group(table, f"{missing['n']} images of the truth have no prediction and are not measured: {names}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
