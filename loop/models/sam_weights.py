"""Weights of Segment Anything: found, checked, and put into the network that they were made for."""

import importlib
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loop.data.weights import PUBLISHED, check_weights, models_folder
from loop.errors import CheckpointError
from loop.models.sam import Sam, segment_anything

SAM_FILES = {"vit_b": "sam_vit_b_01ec64.pth", "vit_l": "sam_vit_l_0b3195.pth", "vit_h": "sam_vit_h_4b8939.pth"}
KINDS = {(768, 12): "vit_b", (1024, 24): "vit_l", (1280, 32): "vit_h"}
"""Width and depth of the image encoder to the published kind."""


_DECODER_HEADS = 8
_REPAIR = "copy or download it again, or name another file by pseudo.sam.checkpoint"
_GIVES_AWAY = {
    "image_encoder.patch_embed.proj.weight": 4,
    "image_encoder.pos_embed": 4,
    "image_encoder.blocks.0.attn.rel_pos_h": 2,
    "image_encoder.blocks.0.mlp.lin1.weight": 2,
    "image_encoder.neck.0.weight": 4,
    "prompt_encoder.mask_downscaling.3.weight": 4,
    "mask_decoder.mask_tokens.weight": 2,
    "mask_decoder.transformer.layers.0.mlp.lin1.weight": 2,
    "mask_decoder.iou_prediction_head.layers.0.weight": 2,
}
"""Tensors that the architecture is read from, and their number of axes."""


class Architecture(NamedTuple):
    """The sizes of a SAM: of the image encoder (width to encoder_bias), the embedding, and the mask decoder."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float
    image_size: int
    patch: int
    window: int
    global_blocks: tuple[int, ...]
    embedding: int
    mask_channels: int
    masks: int
    decoder_depth: int
    decoder_mlp: int
    iou_depth: int
    iou_width: int


def architecture_of(state: Mapping[str, Tensor]) -> Architecture:
    """The architecture that weights belong to, read off their shapes; the decoder has 8 heads as in every SAM.

    Raises:
        CheckpointError: tensors that tell it are missing or have another number of axes.
    """
    lacking = [name for name, axes in _GIVES_AWAY.items() if name not in state or state[name].ndim != axes]
    if lacking:
        raise CheckpointError(f"these are no weights of a SAM: without {_some(lacking)}")
    patches = state["image_encoder.patch_embed.proj.weight"]
    width, patch, grid = patches.shape[0], patches.shape[2], state["image_encoder.pos_embed"].shape[1]
    depth = _count(state, r"image_encoder\.blocks\.(\d+)\.")
    reach = [
        (len(state[name]) + 1) // 2 if (name := f"image_encoder.blocks.{i}.attn.rel_pos_h") in state else grid
        for i in range(depth)
    ]
    iou = "mask_decoder.iou_prediction_head.layers"
    return Architecture(
        width=width,
        depth=depth,
        heads=width // max(1, state["image_encoder.blocks.0.attn.rel_pos_h"].shape[1]),
        mlp_ratio=len(state["image_encoder.blocks.0.mlp.lin1.weight"]) / max(1, width),
        image_size=grid * patch,
        patch=patch,
        window=min(reach),
        global_blocks=tuple(i for i, size in enumerate(reach) if size > min(reach)),
        embedding=state["image_encoder.neck.0.weight"].shape[0],
        mask_channels=state["prompt_encoder.mask_downscaling.3.weight"].shape[0],
        masks=len(state["mask_decoder.mask_tokens.weight"]) - 1,
        decoder_depth=_count(state, r"mask_decoder\.transformer\.layers\.(\d+)\."),
        decoder_mlp=len(state["mask_decoder.transformer.layers.0.mlp.lin1.weight"]),
        iou_depth=_count(state, rf"{re.escape(iou)}\.(\d+)\."),
        iou_width=len(state[f"{iou}.0.weight"]),
    )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for name in state if (found := re.match(pattern, name)))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def build_sam(sizes: Architecture) -> nn.Module:
    """The package's network of these sizes, its weights on the meta device: without memory until they are assigned.

    For the sizes of vit_b, vit_l and vit_h it is what segment_anything.sam_model_registry builds.
    """
    parts = importlib.import_module(f"{segment_anything().__name__}.modeling")
    grid = (sizes.image_size // sizes.patch,) * 2
    with torch.device("meta"):
        net: nn.Module = parts.Sam(
            image_encoder=parts.ImageEncoderViT(
                depth=sizes.depth,
                embed_dim=sizes.width,
                img_size=sizes.image_size,
                mlp_ratio=sizes.mlp_ratio,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                num_heads=sizes.heads,
                patch_size=sizes.patch,
                qkv_bias=True,
                use_rel_pos=True,
                global_attn_indexes=sizes.global_blocks,
                window_size=sizes.window,
                out_chans=sizes.embedding,
            ),
            prompt_encoder=parts.PromptEncoder(
                embed_dim=sizes.embedding,
                image_embedding_size=grid,
                input_image_size=(sizes.image_size, sizes.image_size),
                mask_in_chans=sizes.mask_channels,
            ),
            mask_decoder=parts.MaskDecoder(
                num_multimask_outputs=sizes.masks,
                transformer=parts.TwoWayTransformer(
                    depth=sizes.decoder_depth,
                    embedding_dim=sizes.embedding,
                    mlp_dim=sizes.decoder_mlp,
                    num_heads=_DECODER_HEADS,
                ),
                transformer_dim=sizes.embedding,
                iou_head_depth=sizes.iou_depth,
                iou_head_hidden_dim=sizes.iou_width,
            ),
        )
    for name, values in (("pixel_mean", [123.675, 116.28, 103.53]), ("pixel_std", [58.395, 57.12, 57.375])):
        net.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
    return net.eval()


def read_state(path: Path, kind: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, float32, on the CPU.

    Raises:
        CheckpointError: the file cannot be read (also: truncated), holds something else, NaN, or another kind of SAM.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle or archive can raise nearly anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is truncated or no checkpoint of torch: {first}; {_REPAIR}") from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        inside = f"a dict of {_some([str(key) for key in state])}" if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} holds {inside}; expected the tensors of a SAM by name, as published; {_REPAIR}")
    try:
        sizes = architecture_of(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; {_REPAIR}") from error
    found = KINDS.get((sizes.width, sizes.depth), kind)
    if found != kind:
        raise CheckpointError(f"{path} is a {found}, the setting says {kind}; set pseudo.sam.kind to {found}")
    wrong = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
    if wrong:
        raise CheckpointError(f"{path} holds NaN or infinity in {_some(wrong)}; {_REPAIR}")
    return {name: value.float() for name, value in state.items()}


def checkpoint_path(kind: str, checkpoint: str = "") -> Path:
    """Where the weights of SAM `kind` lie: `checkpoint`, or the published file in `models_folder()`.

    Raises:
        CheckpointError: it is not there or out of reach; the text says where it is looked for, where to get it, and its
            checksum.
    """
    try:
        path = Path(checkpoint).expanduser() if checkpoint else models_folder() / SAM_FILES[kind]
        found = path.is_file()
    except (OSError, RuntimeError) as error:  # a folder that may not be entered, a home of nobody
        raise CheckpointError(f"weights of SAM {kind} at {checkpoint!r}: {error}; name another file") from error
    if not found:
        wanted = PUBLISHED[SAM_FILES[kind]]
        raise CheckpointError(
            f"no weights of SAM {kind}: {path} is not there; download {wanted.url} ({wanted.size} bytes, sha256 "
            f"{wanted.sha256}) to {models_folder() / SAM_FILES[kind]}, or name a file by pseudo.sam.checkpoint; the "
            "loop goes on without SAM"
        )
    return path


def load_sam(kind: str, checkpoint: str = "", *, device: str = "auto", precision: str = "auto") -> Sam:
    """A SAM with the weights of a file, on a device; the architecture is read off the weights.

    Args:
        kind: "vit_b", "vit_l" or "vit_h". Weights of other sizes than these three are loaded as they are.
        checkpoint: the file; "" = the published one of that kind in `models_folder()`.
        device: "auto", "cpu" or "cuda".
        precision: "auto", "bf16" or "fp32", of image encoder and mask decoder.

    Raises:
        CheckpointError: no file, not as published under its name, truncated, of another kind or architecture.
        ConfigError: no such device.
    """
    path = checkpoint_path(kind, checkpoint)
    sha256 = check_weights(path)
    state = read_state(path, kind)
    try:
        net = build_sam(architecture_of(state))
    except (RuntimeError, AssertionError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} has sizes that no SAM has: {error}; {_REPAIR}") from error
    needed = net.state_dict()
    missing, unexpected = ([name for name in a if name not in b] for a, b in ((needed, state), (state, needed)))
    differ = [
        f"{name} {tuple(state[name].shape)}, expected {tuple(needed[name].shape)}"
        for name in needed
        if name in state and state[name].shape != needed[name].shape
    ]
    faults = [f"{what} {_some(n)}" for what, n in (("no", missing), ("unknown", unexpected), ("size of", differ)) if n]
    if faults:
        raise CheckpointError(f"{path} does not fit a SAM: {'; '.join(faults)}; {_REPAIR}")
    net.load_state_dict(state, assign=True)
    return Sam(net, version=f"{kind}-{sha256[:8]}", device=device, precision=precision)
