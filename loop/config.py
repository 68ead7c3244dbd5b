"""Every setting with its default and its range; YAML changes them, an unknown key is an error.

Secrets and addresses of services are not here: they come from the environment or the workspace (flows/local).
"""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loop.errors import ConfigError

Head = Literal["interior", "nuclei", "border", "background", "overlap", "distance"]
OverlapKind = Literal["none", "v0", "v1", "v2", "v3", "v4"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(_Frozen):
    """Which network, and how large (loop/models)."""

    name: str = "seu_net"
    in_channels: Literal[1, 3] = 3
    base: int = Field(16, ge=4, le=128, description="channels of the first level; doubled at each level down")
    depth: int = Field(4, ge=2, le=6, description="number of times the image is halved")
    reduction: int = Field(8, ge=1, description="squeeze-and-excitation: channels are squeezed by this factor")
    dark_background: bool = Field(True, description="images with a bright background are inverted first")
    heads: tuple[Head, ...] = Field(
        ("interior", "border"), min_length=1, description="unet, seu_net: what is predicted"
    )
    decoders: Literal["shared", "decoupled"] = Field(
        "shared", description="unet, seu_net: one decoder for all heads, or one each"
    )
    queries: int = Field(100, ge=4, le=1000, description="sparse_seu_net: most cells of a window")
    levels: Literal["single", "multi"] = Field("multi", description="sparse_seu_net: where instance branches fork")
    width: int = Field(32, ge=8, le=512, description="sparse_seu_net: channels of the mask and instance branches")
    mask_stride: Literal[1, 2, 4] = Field(2, description="sparse_seu_net: masks are predicted this much smaller")
    overlap: bool = Field(False, description="sparse_seu_net: an overlap head whose features feed the branches")
    objectness: bool = Field(False, description="sparse_seu_net: cells also predict their own IoU")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of feature maps blanked at the coarsest levels, for dropout passes"
    )

    @model_validator(mode="after")
    def _heads_find_cells(self) -> "ModelConfig":
        if len(set(self.heads)) < len(self.heads):
            raise ValueError(f"heads names one twice: {', '.join(self.heads)}; name each once")
        if not {"interior", "background"} & set(self.heads):
            raise ValueError(f"heads {', '.join(self.heads)} cannot find cells; add interior or background")
        return self


class InstanceConfig(_Frozen):
    """From what a network gives to cells (loop/models/watershed.py, queries.py, stitch.py)."""

    foreground: float = Field(0.5, gt=0, lt=1, description="a pixel belongs to a cell above this probability")
    seed: float = Field(0.4, gt=0, lt=1, description="interior minus border above this starts a cell")
    split: float = Field(0.2, ge=0.01, le=5, description="cells part where their width falls by about this share")
    smooth_px: float = Field(1.0, ge=0, le=10, description="blur of interior minus border before seeds are sought, px")
    min_area: int = Field(20, ge=1, description="smaller cells are dropped, px")
    min_score: float = Field(
        0.8, ge=0, lt=1, description="cells of a lower mean interior probability are dropped (not sparse)"
    )
    tile: int = Field(512, ge=32, description="side of a window at inference, px; sparse_seu_net: train.crop")
    overlap: int = Field(128, ge=0, description="how far windows overlap, px; at most half a window (sparse: a third)")
    tta: Literal[1, 2, 4, 8] = Field(1, description="an image is looked at in so many flips and turns")
    floor: float = Field(0.1, ge=0, lt=1, description="sparse_seu_net: cells of a lower score are dropped")


class TrainConfig(_Frozen):
    """How a challenger is trained (loop/training)."""

    minutes: float = Field(3.0, gt=0, description="wall-clock budget of the optimiser")
    max_steps: int | None = Field(
        None, ge=1, description="a budget in steps instead, for runs that must repeat exactly"
    )
    crop: int = Field(160, ge=32, multiple_of=16, description="side of a training crop, px")
    batch: int = Field(4, ge=1, description="crops a step; small ones give more steps in the same time")
    accumulate: int = Field(1, ge=1, description="batches whose gradients are summed for one optimiser step")
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    warmup_steps: int = Field(30, ge=0)
    ema: float = Field(0.98, ge=0, lt=1, description="decay of the averaged weights that are kept")
    patience: int = Field(0, ge=0, description="ends after so many validations without a better AP; 0 = never")
    validations: int = Field(4, ge=0, description="times that validation images, where there are any, are predicted")
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile; auto = on a GPU")
    interior_weight: float = Field(1.0, gt=0, description="of a head in the summed loss (thesis eq. 4.2)")
    nuclei_weight: float = Field(1.0, gt=0, description="likewise")
    border_weight: float = Field(2.0, gt=0, description="likewise")
    background_weight: float = Field(1.0, gt=0, description="likewise")
    distance_weight: float = Field(1.0, gt=0, description="likewise")
    overlap_weight: float = Field(1.0, gt=0, description="likewise")
    dice: bool = Field(True, description="Dice is added to each head's cross-entropy")
    overlap_map: OverlapKind = Field("none", description="map that says where overlaps are likely (thesis 4.3)")
    overlap_use: Literal["target", "loss"] = Field("target", description="the map scales the target or the loss")
    focal_alpha: float = Field(0.25, gt=0, lt=1, description="share of the positive side in the focal loss")
    focal_gamma: float = Field(2.0, ge=0, description="how much easy pixels are left out of the focal loss")
    class_weight: float = Field(4.0, gt=0, description="sparse_seu_net: of the class loss")
    mask_dice_weight: float = Field(2.0, ge=0, description="sparse_seu_net: of the masks' Dice loss")
    mask_bce_weight: float = Field(5.0, ge=0, description="sparse_seu_net: of the masks' cross-entropy")
    objectness_weight: float = Field(1.0, ge=0, description="sparse_seu_net: of the IoU's squared error")
    balance: float = Field(0.5, ge=0, le=1, description="rare modalities: chance = (images of its kind) ** -balance")
    scale_jitter: float = Field(1.6, ge=1, le=4, description="crops are made up to this factor larger or smaller")
    rotate: float = Field(15.0, ge=0, le=45, description="turn of a crop beyond quarter turns, degrees")
    elastic: float = Field(2.0, ge=0, le=20, description="standard deviation of the smooth displacement, px")
    intensity: float = Field(1.0, ge=0, le=2, description="strength of the changes of brightness, colour and noise")
    invert: float = Field(0.0, ge=0, le=1, description="share of crops whose intensities are inverted")
    veil: float = Field(
        0.15, ge=0, le=1, description="share of crops with dim blobs behind the cells that are no cells"
    )
    dropout: float = Field(0.0, ge=0, le=1, description="share of crops in which rectangles are blanked out")
    pseudo_share: float = Field(0.33, ge=0, lt=1, description="share of the crops that pseudo-labelled images give")
    pseudo_ramp: float = Field(0.2, ge=0, le=1, description="share of the budget in which their weight rises from 0")
    consistency: float = Field(
        0.0, ge=0, description="weight of agreeing with the averaged weights on pseudo-labelled crops"
    )
    gan_l1_weight: float = Field(100.0, ge=0, description="pix2pix: of the planes' mean absolute error")
    gan_rate: float = Field(4e-4, gt=0, description="pix2pix: learning rate of the discriminator")
    gan_smooth: float = Field(0.1, ge=0, lt=0.5, description="pix2pix: real patches count as 1 minus this")
    gan_penalty: float = Field(1.0, ge=0, description="pix2pix: of the discriminator's squared gradient (R1)")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    seed: int = 0


class SelectConfig(_Frozen):
    """Which images a person sees next (loop/acquisition)."""

    strategy: str = Field("celloop", description="a key of ACQUISITIONS: how images to teach with are chosen")
    first_strategy: str = Field("typical", description="likewise while there is no model yet; random = by chance")
    first_batch: int = Field(12, ge=2, description="images of the first batch")
    first_control: float = Field(0.5, gt=0, lt=1, description="share of the first batch drawn at random as hold-out")
    batch: int = Field(8, ge=1)
    control: float = Field(0.2, ge=0, lt=1, description="share of each later batch drawn at random as hold-out")
    measure: str = Field("entropy_cells", description="the uncertainty that strategies work with (loop/uncertainty)")
    embedding: Literal["model", "look"] = Field(
        "look", description="what makes images alike: brightness, colour and texture, or the model's own features"
    )
    passes: Literal["once", "turns", "dropout"] = Field(
        "once", description="turns, dropout: an image is looked at several times, for bald and disagreement"
    )
    n_passes: int = Field(4, ge=2, le=8, description="how often, where it is several times")
    quick_first: int = Field(2, ge=0, description="so many of the quickest images of a batch come first")
    annotators: tuple[str, ...] = Field((), description="logins of people who share a batch; () = all see one queue")
    overlap: float = Field(0.0, ge=0, le=1, description="share of a batch that two of them label, to see them agree")

    @model_validator(mode="after")
    def _each_once(self) -> "SelectConfig":
        if len(set(self.annotators)) < len(self.annotators):
            raise ValueError(f"annotators names somebody twice: {', '.join(self.annotators)}; name each once")
        return self


class EffortConfig(_Frozen):
    """What a person's work costs before it was measured, in seconds (loop/effort)."""

    image_s: float = Field(8.0, ge=0, description="opening, looking, submitting")
    keep_s: float = Field(0.5, ge=0, description="a predicted cell that stays as it is")
    edit_s: float = Field(6.0, ge=0, description="a predicted cell that is reshaped")
    delete_s: float = Field(1.5, ge=0, description="a predicted cell that is removed")
    add_s: float = Field(8.0, ge=0, description="a cell that is drawn")
    prior_images: float = Field(10.0, gt=0, description="the figures above count as much as so many measured images")


class EstimateConfig(_Frozen):
    """What a round says of its own worth: the gain over random, what more labels would bring (flows/estimate.py)."""

    every: int = Field(3, ge=0, description="models of random images only are trained each so many rounds; 0 = never")
    min_images: int = Field(16, ge=4, description="with fewer labelled hold-out images nothing is estimated")
    share: float = Field(0.5, gt=0, le=1, description="of the training budget, for each such model")
    ahead_images: int = Field(50, ge=1, description="the forecast says what so many more images would bring")
    budget_minutes: float | None = Field(None, gt=0, description="of people's time in all; none = no end is set")
    worth_ap: float = Field(0.01, ge=0, description="more images that bring less than this are not worth it: stop")


class GateConfig(_Frozen):
    """When a challenger replaces the champion (loop/metrics/paired.py)."""

    confidence: float = Field(0.9, gt=0.5, lt=1, description="of the two-sided paired bootstrap interval")
    margin: float = Field(0.0, description="the interval's lower end must lie above this difference in AP")
    resamples: int = Field(2000, ge=100)
    min_images: int = Field(5, ge=2, description="a hold-out smaller than this decides nothing")


class PublishConfig(_Frozen):
    """How masks are shown in Label Studio."""

    labels: tuple[str, ...] = ("Cell",)
    nucleus_label: str = Field("Nucleus", description="regions of this label are nuclei, unless it is the first one")
    doubtful_label: str = Field("Cell?", description="pre-labels of low confidence get this label; '' = none does")
    doubtful_below: float = Field(0.5, ge=0, le=1, description="a confidence under this is low")
    done_label: str = Field("Done area", description="outside such regions nothing is taught; '' = no such label")
    tolerance_px: float = Field(0.5, ge=0, le=5, description="how far a polygon may leave the mask's outline")
    max_points: int = Field(
        6000, ge=0, description="corners of all polygons of a task; above it they are simplified further; 0 = no limit"
    )
    chunk: int = Field(500, ge=1, description="tasks a request; Label Studio recounts the project at each")


class TilesConfig(_Frozen):
    """Large and crowded images are offered as tiles, each a task of its own (flows/tiling.py)."""

    max_px: int = Field(4_000_000, ge=0, description="an image of more pixels is cut when it is added; 0 = never")
    max_cells: int = Field(300, ge=0, description="likewise when the model finds more cells in it; 0 = never")
    side: int = Field(1024, ge=64, description="longer side of a tile's own part, px, at most")
    halo: int = Field(64, ge=0, description="a tile shows so much of its neighbours on each side, px")


class ClickConfig(_Frozen):
    """How a click or a box is answered while somebody labels (backend/)."""

    model: Literal["auto", "champion", "sam"] = Field(
        "auto", description="auto: SAM (pseudo.sam) where its weights are there, else the champion"
    )
    typical: bool = Field(True, description="of SAM's masks the one of a usual size and shape is taken")
    apart: bool = Field(True, description="pixels of other cells of the image are left out of the answer")
    ahead: int = Field(16, ge=0, description="so many of the next images are prepared while nobody clicks; 0 = none")
    store_mb: int = Field(4096, ge=0, description="prepared images kept on disk, the least recently used go first")


class LabelsConfig(_Frozen):
    """Which annotation of an image counts (flows/freeze.py)."""

    several: Literal["newest", "reviewed"] = Field(
        "reviewed", description="of several: the newest, or one starred as ground truth before all others"
    )


class SamConfig(_Frozen):
    """Segment Anything: clicks, and the labellers sam and sam2 (loop/pseudo/sam.py)."""

    kind: Literal["vit_b", "vit_l", "vit_h"] = "vit_b"
    checkpoint: str = Field("", description="file of the weights; '' = CELLOOP_HOME/models/NAME as published")
    mode: Literal["automatic", "prompted", "both"] = Field("prompted", description="prompted: by the champion's cells")
    points_per_side: int = Field(32, ge=1, le=256, description="automatic: the grid of points is so fine")
    hsv_filter: bool = Field(True, description="colour images: masks whose colour is not that of cells are dropped")


class PseudoConfig(_Frozen):
    """Who proposes masks of unlabelled images, and which of them teach (loop/pseudo)."""

    labellers: tuple[str, ...] = Field(("champion",), description="keys of PSEUDO_LABELLERS that propose masks")
    teach: bool = Field(True, description="confident cells teach the next model; off = they are only shown")
    keep: float = Field(0.6, gt=0, le=1, description="cells of this confidence or more teach")
    doubt: float = Field(
        0.15, ge=0, lt=1, description="those below keep but not below this are neither cell nor ground"
    )
    sure_share: float = Field(
        0.6, ge=0, le=1, description="an image teaches if so much of its cells, by confidence, are kept"
    )
    ground_px: int = Field(12, ge=0, description="background is taught so far around cells that teach, px")
    keep_iou: float = Field(0.75, gt=0, lt=1, description="confidence: chance that a person's cell agrees so far")
    views: Literal[1, 2, 4, 7, 8] = Field(4, description="flips and turns in which an image is looked at")
    fuse_iou: float = Field(0.15, gt=0, lt=1, description="cells of two labellers that overlap so far are one")
    overlaps: bool = Field(False, description="a pixel may belong to two fused cells")
    max_cells: int = Field(2000, ge=1, description="a labeller that proposes more in an image is not believed there")
    images: int = Field(200, ge=1, description="unlabelled images that teach in a round, at most, drawn at random")
    reserve: float = Field(0.3, ge=0, lt=1, description="share of the pool kept from teaching: the hold-out's source")
    min_precision: float = Field(0.6, ge=0, le=1, description="a labeller of lower audited precision stops teaching")
    audit_cells: int = Field(30, ge=1, description="an audit of fewer proposed cells decides nothing")
    calibrate_cells: int = Field(40, ge=10, description="fewer cells than this calibrate nothing")
    labelled_only: float = Field(1.0, gt=0, le=1, description="budget of the challenger without pseudo-labels, a share")
    labeller_minutes: float = Field(1.0, gt=0, description="training of each further labeller in a round")
    sam: SamConfig = SamConfig()
    weights: dict[str, str] = Field({}, description="of cellpose, stardist, yolo, mask_rcnn, sam2: a file or name")

    @model_validator(mode="after")
    def _thresholds_in_order(self) -> "PseudoConfig":
        if self.doubt >= self.keep:
            raise ValueError(f"doubt={self.doubt} is not below keep={self.keep}; lower doubt")
        return self


class TriggerConfig(_Frozen):
    """When a round starts by itself."""

    new_annotations: int = Field(20, ge=1, description="a round after this many new annotations; see `watch`")
    watch_seconds: int = Field(300, ge=10, description="how often Label Studio is asked what is new")
    cron: str | None = Field(None, description="a round at these times too, e.g. '0 3 * * *'")


class RetrainConfig(_Frozen):
    """Where a challenger is trained."""

    pool: str | None = Field(
        None, description="Prefect work pool whose worker trains; none = in the process that runs the round"
    )
    validation: float = Field(
        0.0, ge=0, lt=1, description="share of the teaching images kept back to fit thresholds and stop early"
    )


class LoopConfig(_Frozen):
    """The whole tree, as configs/loop.yaml writes it."""

    model: ModelConfig = ModelConfig()
    instances: InstanceConfig = InstanceConfig()
    train: TrainConfig = TrainConfig()
    select: SelectConfig = SelectConfig()
    effort: EffortConfig = EffortConfig()
    estimate: EstimateConfig = EstimateConfig()
    gate: GateConfig = GateConfig()
    publish: PublishConfig = PublishConfig()
    tiles: TilesConfig = TilesConfig()
    click: ClickConfig = ClickConfig()
    labels: LabelsConfig = LabelsConfig()
    pseudo: PseudoConfig = PseudoConfig()
    trigger: TriggerConfig = TriggerConfig()
    retrain: RetrainConfig = RetrainConfig()


def load_config(path: Path | None = None, overrides: dict[str, Any] | None = None) -> LoopConfig:
    """The settings of a YAML file with `overrides` on top; without a file, the defaults.

    Args:
        path: a YAML file of the shape of configs/loop.yaml, any part of it left out.
        overrides: dotted names to values, e.g. {"train.minutes": 0.5}; None values are skipped.

    Raises:
        ConfigError: the file is missing or no YAML mapping, a key is unknown, or a value is out of its range.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the config {path}: {error.strerror}; give a YAML file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no YAML: {error}; see configs/loop.yaml") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"{path} holds a {type(loaded).__name__}; expected a mapping as in configs/loop.yaml")
        tree = loaded or {}
    for name, value in (overrides or {}).items():
        if value is None:
            continue
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(
                    f"{name} is no setting: {parent} holds a value; configs/loop.yaml lists every setting"
                )
        node[leaf] = value
    try:
        return LoopConfig.model_validate(tree)
    except ValidationError as error:
        where = path or "the settings"
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given {e['input']!r})" for e in error.errors())
        raise ConfigError(f"{where}: {faults}; configs/loop.yaml lists every setting") from error
