"""Commands on plain folders, without services: train, predict, evaluate. Heavy imports wait for their command."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training that was killed.")] = False,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Trains a model on a dataset folder, no services needed."""

    def work() -> None:
        from flows.folders import train_folder
        from flows.telling import telling_training
        from loop.config import load_config
        from loop.training.distributed import is_first_process

        overrides = {
            "model.name": model,
            "train.minutes": minutes,
            "train.max_steps": max_steps,
            "train.seed": seed,
            "train.device": device,
        }
        settings = load_config(config, overrides)
        last: dict[str, float] = {}
        with telling() as tell:
            shown = telling_training(tell, settings.train)

            def log(step: int, values: dict[str, float]) -> None:
                last.update(values)
                shown(step, values)

            done = train_folder(data, out, settings, log, resume=resume)
        if is_first_process():
            emit({**asdict(done), "loss": last.get("loss")}, json=json, render=_trained)

    run(work, json=json)


def predict(
    images: Annotated[Path, typer.Option("--images", help="Folder of images.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")],
    model: Annotated[
        Path | None, typer.Option("--model", help="Folder of a model; the champion of the labellers.")
    ] = None,
    labeller: Annotated[
        list[str] | None,
        typer.Option(
            "--labeller",
            help="Who proposes the masks, e.g. sam,champion; of several, or with `ensemble`, they are fused.",
            show_default=False,
        ),
    ] = None,
    formats: Annotated[str, typer.Option("--format", help="some of labels,layers,coco,labelstudio")] = "labels",
    tta: Annotated[int | None, typer.Option("--tta", help="Flips and turns to look at: 1, 2, 4 or 8.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Masks of a model, or of labellers, for a folder of images."""

    def work() -> None:
        from flows.folders import predict_folder
        from loop.config import load_config

        wanted, names = _parts([formats]), _parts(labeller or [])
        with telling() as tell:
            done = predict_folder(
                model,
                images,
                out,
                wanted,
                tta=tta,
                device=device,
                labellers=names,
                config=load_config(config),
                tell=tell,
            )
        emit(asdict(done), json=json, render=_summary)

    run(work, json=json)


def evaluate(
    pred: Annotated[Path, typer.Option("--pred", help="Folder that `predict` wrote (its layers/, else labels/).")],
    gt: Annotated[Path, typer.Option("--gt", help="Dataset folder, or folder of label images.")],
    errors: Annotated[bool, typer.Option("--errors", help="Also what kinds of errors there are.")] = False,
    json: JsonOption = False,
) -> None:
    """AP, F1, PQ, AJI, Dice, IoU and count error, whole and for each modality."""

    def work() -> None:
        from flows.folders import evaluate_folders

        for folder in (pred, gt):
            if not folder.is_dir():
                raise InputError(f"{folder} is no folder; give one that holds label images")
        emit(evaluate_folders(pred, gt, errors=errors), json=json, render=_metrics)

    run(work, json=json)


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to `app`."""
    app.command("train")(train)
    app.command("predict")(predict)
    app.command("evaluate")(evaluate)


def _parts(given: list[str]) -> list[str]:
    """The words of options that may be repeated and may hold commas."""
    return [part.strip() for text in given for part in text.split(",") if part.strip()]


def _summary(document: Document) -> Table:
    table = Table(show_header=False, box=None)
    for key, value in document.items():
        if key != "problems":
            table.add_row(key, f"{value:.4f}" if isinstance(value, float) else Text(str(value)))
    for problem in document["problems"]:
        table.add_row("left out", Text(str(problem)))
    return table


def _trained(document: Document) -> Table:
    validation = document["validation"] or {}
    rows = {
        "model": document["model"],
        "device": document["device"],
        "images": f"{document['images']}, and {document['validation_images']} to validate",
        "steps": document["steps"],
        "minutes": f"{document['minutes']:.1f}",
        "loss": _number(document["loss"]),
        **{f"validation {key}": _number(value) for key, value in validation.items()},
        "out": document["out"],
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    for problem in document["problems"]:
        table.add_row("left out", Text(str(problem)))
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
    parts: list[Table | Text] = [table]
    if "errors" in document:
        parts += _errors(document["errors"])
    missing = document["missing"]
    if missing["n"]:
        names = ", ".join(missing["images"]) + (", ..." if missing["n"] > len(missing["images"]) else "")
        parts.append(Text(f"{missing['n']} images of the truth have no prediction and are not measured: {names}"))
    read = document["read"]
    return Group(*parts, Text(f"compared: {read['pred']} with {read['gt']}"))


def _errors(errors: Document) -> list[Table | Text]:
    """What better masks, or only the best-matching cells, would give; and the counts of what went wrong."""
    variants = {"as predicted": "as_predicted", "true masks": "with_true_masks", "best matched only": "best_matched"}
    table = Table("", *variants)
    for key in errors["as_predicted"]:
        table.add_row(key.replace("_", " "), *(_number(errors[name][key]) for name in variants.values()))
    counts = ", ".join(f"{errors[kind]} {kind}" for kind in ("missed", "invented", "merged", "split"))
    return [table, Text(f"cells: {counts}")]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
