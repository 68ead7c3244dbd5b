"""The passes through SAM's image encoder and mask decoder, step by step through the package's own layers.

Source: segment_anything 1.0, modeling/image_encoder.py and modeling/mask_decoder.py. Differs: the encoder gives way
between its steps, and its blocks without windows attend a few rows of the image at a time, which stays in a CPU's cache
(more than twice as fast) and needs no map of all places by all; what all prompts of an image share is expanded, not
repeated, and laid out as the decoder's transformer reads it (a quarter less time on a CPU). Equal up to the rounding of
float32.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

ATTENTION_AT_ONCE = {"cpu": 7_000_000, "cuda": 1 << 28}
"""So many weights of attention are held at once (two rows of ViT-B's 64 on a CPU)."""

Pause = Callable[[], object]
Multimask = bool | Literal["all"]


def encode_pixels(encoder: Any, pixels: Tensor, pause: Pause) -> Tensor:
    """The features (1, C, h, w) of normalised pixels (1, 3, side, side); `pause` is called between the steps."""
    tokens = encoder.patch_embed(pixels)
    if encoder.pos_embed is not None:
        tokens = tokens + encoder.pos_embed
    for block in encoder.blocks:
        pause()
        if block.window_size > 0:
            tokens = block(tokens)
            continue
        tokens = tokens + _attend(block.attn, block.norm1(tokens), pause)
        tokens = tokens + block.mlp(block.norm2(tokens))
    features: Tensor = encoder.neck(tokens.permute(0, 3, 1, 2))
    return features


def _attend(attention: Any, tokens: Tensor, pause: Pause) -> Tensor:
    """What the package's attention gives for tokens (1, h, w, C), a few rows of queries at a time."""
    height, width = tokens.shape[1:3]
    heads, places = attention.num_heads, height * width
    queries, keys, values = (
        attention.qkv(tokens).reshape(places, 3, heads, -1).permute(1, 2, 0, 3).contiguous().unbind(0)
    )
    up_down, across = _relative(attention.rel_pos_h, height), _relative(attention.rel_pos_w, width)
    rows = max(1, ATTENTION_AT_ONCE[tokens.device.type] // (heads * places * width))
    parts = []
    for top in range(0, height, rows):
        pause()
        asked = queries[:, top * width : (top + rows) * width]
        grid = asked.unflatten(1, (-1, width))
        by_row = torch.einsum("nhwc,hkc->nhwk", grid, up_down[top : top + rows])
        by_column = torch.einsum("nhwc,wkc->nhwk", grid, across)
        weights = ((asked * attention.scale) @ keys.transpose(1, 2)).view(heads, -1, width, height, width)
        weights = weights + by_row[..., None] + by_column[..., None, :]
        parts.append(weights.view(heads, -1, places).softmax(dim=-1) @ values)
    found: Tensor = attention.proj(torch.cat(parts, dim=1).transpose(0, 1).reshape(1, height, width, -1))
    return found


def _relative(table: Tensor, size: int) -> Tensor:
    """(size, size, C): what a query at i and a key at j, i - j apart, add to each other's weight."""
    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places + size - 1]


def decode_prompts(
    decoder: Any, image: tuple[Tensor, Tensor, Tensor], prompts: Tensor, *, multimask: Multimask
) -> tuple[Tensor, Tensor]:
    """Logits (P, M, 4h, 4w) and expected IoU (P, M) of P prompts about one image.

    Args:
        decoder: the package's mask decoder.
        image: three (1, C, h, w): its features, the code of each place, and what the prompts say about each place,
            which is the same for all as long as none of them is a mask.
        prompts: (P, K, C) the codes of their points.
        multimask: three masks a prompt, else the one for prompts that leave no doubt, or "all": that one after them.
    """
    features, places, said = image
    count = len(prompts)
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(count, -1, -1)
    seen, places = (
        t.contiguous(memory_format=torch.channels_last).expand(count, -1, -1, -1) for t in (features + said, places)
    )
    answers, changed = decoder.transformer(seen, places, torch.cat([own, prompts], dim=1))
    fine = decoder.output_upscaling(changed.transpose(1, 2).reshape(seen.shape))
    asked = [*(range(1, decoder.num_mask_tokens) if multimask else ()), *((0,) if multimask in (False, "all") else ())]
    weights = torch.stack([decoder.output_hypernetworks_mlps[k](answers[:, 1 + k]) for k in asked], dim=1)
    logits = (weights @ fine.flatten(2)).unflatten(2, fine.shape[2:])
    return logits, decoder.iou_prediction_head(answers[:, 0])[:, asked]
