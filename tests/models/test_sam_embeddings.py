"""Embeddings kept in half precision, bfloat16, and an encoder that gives way: on a small SAM that knows drawn cells."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from loop.errors import CheckpointError, NonFiniteError, ShapeError
from loop.models.sam import Embedding, Sam, segment_anything
from loop.models.sam_steps import ATTENTION_AT_ONCE
from loop.models.sam_weights import Architecture, build_sam

SIDE = 64
SIZES = Architecture(
    width=32,
    depth=2,
    heads=4,
    mlp_ratio=2.0,
    image_size=SIDE,
    patch=8,
    window=4,
    global_blocks=(1,),
    embedding=32,
    mask_channels=8,
    masks=3,
    decoder_depth=1,
    decoder_mlp=32,
    iou_depth=3,
    iou_width=16,
)
STEPS, RATE = 140, 6e-3


def drawn(rng):
    """An image (SIDE, SIDE, 3) of four bright ellipses, their masks (4, SIDE, SIDE) and middles (4, 1, 2) x, y."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    middles = np.array([(cx, cy) for cy in (17, 47) for cx in (17, 47)]) + rng.uniform(-3, 3, (4, 2))
    radii = rng.uniform(5, 12, (4, 2))
    cells = zip(middles, radii, strict=True)
    masks = np.stack([((x - m[0]) / r[0]) ** 2 + ((y - m[1]) / r[1]) ** 2 < 1 for m, r in cells])
    grey = np.where(masks.any(axis=0), rng.uniform(120, 220), 30) + rng.normal(0, 8, (SIDE, SIDE))
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2), masks, middles[:, None]


def started(generator):
    """A network with weights of the usual spread."""
    net = build_sam(SIZES)
    state = {}
    for name, value in net.state_dict().items():
        if value.ndim == 1:
            state[name] = torch.full(value.shape, float(name.endswith("weight")))
            continue
        fan = value.shape[0] if "output_upscaling" in name else value[0].numel()
        spread = 0.5 if "gaussian" in name else 0.02 if "pos" in name else fan**-0.5
        state[name] = spread * torch.randn(value.shape, generator=generator)
    net.load_state_dict(state, assign=True)
    return net


def learn(net, rng):
    rates = torch.optim.AdamW(net.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(rates, RATE, total_steps=STEPS)
    for _ in range(STEPS):
        image, masks, middles = drawn(rng)
        pixels = torch.from_numpy(image).permute(2, 0, 1).float()
        points = torch.from_numpy(middles).float() - 0.5
        sparse, dense = net.prompt_encoder(points=(points, torch.ones(4, 1)), boxes=None, masks=None)
        logits, _ = net.mask_decoder(
            image_embeddings=net.image_encoder(net.preprocess(pixels)[None]),
            image_pe=net.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        wanted = torch.from_numpy(masks).float()[:, None]
        wanted = nn.functional.interpolate(wanted, logits.shape[-2:], mode="area").expand_as(logits)
        probs = logits.sigmoid()
        dice = (2 * (probs * wanted).sum((2, 3)) + 1) / ((probs + wanted).sum((2, 3)) + 1)
        loss = 5 * nn.functional.binary_cross_entropy_with_logits(logits, wanted) - dice.mean()
        rates.zero_grad()
        loss.backward()
        rates.step()
        schedule.step()
    return net.eval()


@pytest.fixture(scope="module")
def net():
    """Learnt in two seconds: the encoder has a block with windows and one without."""
    return learn(started(torch.Generator().manual_seed(0)), np.random.default_rng(0))


@pytest.fixture(scope="module")
def sam(net):
    return Sam(net, version="drawn", device="cpu", precision="fp32")


def full(crop, shape=(SIDE, SIDE)):
    mask = np.zeros(shape, bool)
    if crop is not None:
        x0, y0, x1, y1 = crop.box_xyxy
        mask[y0:y1, x0:x1] = crop.mask
    return mask


def ious(answers, masks):
    found = [full(crops[0]) for crops in answers.crops]
    return [(a & b).sum() / max(1, (a | b).sum()) for a, b in zip(found, masks, strict=True)]


def scenes(count=6):
    rng = np.random.default_rng(99)
    return [drawn(rng) for _ in range(count)]


def against(sam, other_encode, other_decode):
    """IoU of each cell's mask with that of `sam`, where the image is encoded or the prompt answered otherwise."""
    found = []
    for image, _, middles in scenes():
        exact = [full(crops[0]) for crops in sam.decode(sam.encode(image), points=middles).crops]
        found += ious(other_decode(other_encode(image), points=middles), exact)
    return np.array(found)


def test_the_small_network_finds_the_drawn_cells(sam):
    """Else what follows would compare noise."""
    found = [ious(sam.decode(sam.encode(image), points=middles), masks) for image, masks, middles in scenes()]
    assert np.mean(found) > 0.75


def test_masks_from_a_half_precision_embedding(sam):
    found = against(sam, lambda image: sam.embedding(sam.encode(image).to_arrays()), sam.decode)
    assert found.min() >= 0.98


def test_masks_of_bfloat16_encoder_and_decoder(net, sam):
    half = Sam(net, version="drawn", device="cpu", precision="bf16")
    assert against(sam, half.encode, sam.decode).mean() >= 0.98
    assert against(sam, sam.encode, half.decode).mean() >= 0.98
    assert against(sam, half.encode, half.decode).mean() >= 0.98


def test_bfloat16_leaves_the_scores_and_gives_plain_arrays(net, sam):
    half = Sam(net, version="drawn", device="cpu", precision="bf16")
    image, _, middles = scenes(1)[0]
    embedding = sam.encode(image)
    one, other = half.decode(embedding, points=middles), sam.decode(embedding, points=middles)
    assert one.scores.dtype == one.stability.dtype == np.float32
    np.testing.assert_allclose(one.scores, other.scores, atol=0.02)
    np.testing.assert_allclose(one.stability, other.stability, atol=0.03)
    assert not np.array_equal(one.scores, other.scores)


@pytest.mark.parametrize("shape", [(64, 64), (131, 90), (40, 333)])
def test_masks_and_stability_are_those_of_whole_images(net, sam, shape):
    """Cells fill a corner of the image; the package scales all of it."""
    image = np.array(Image.fromarray(scenes(1)[0][0]).resize(shape[::-1]))
    predictor = segment_anything().SamPredictor(net)
    predictor.set_image(image)
    embedding = sam.encode(image)
    points = np.random.default_rng(5).uniform(0, shape[::-1], (5, 1, 2))
    answers = sam.decode(embedding, points=points)
    shift = 0.5 * np.array(shape[::-1]) / embedding.seen[::-1]
    for i in range(5):
        logits, _, _ = predictor.predict(points[i] - shift, np.ones(1), return_logits=True)
        for crop, stable, values in zip(answers.crops[i], answers.stability[i], logits, strict=True):
            sure = np.abs(values) > 1e-3
            assert np.array_equal(full(crop, shape)[sure], (values > 0)[sure])
            high, low = (values > 1).sum(), (values > -1).sum()
            unsure = (np.abs(np.abs(values) - 1) < 1e-3).sum()
            assert abs(stable * low - high) <= 2 * unsure + 1e-3 * low


@pytest.mark.parametrize("shape", [(64, 64), (40, 56), (150, 90), (1, 300)])
def test_an_embedding_there_and_back(sam, shape):
    image = np.random.default_rng(3).integers(0, 256, (*shape, 3), dtype=np.uint8)
    embedding = sam.encode(image)
    assert embedding.nbytes == 32 * 8 * 8 * 4
    arrays = embedding.to_arrays()
    assert arrays["features"].dtype == np.float16
    assert arrays["features"].nbytes == embedding.nbytes // 2
    back = sam.embedding(arrays)
    assert (back.shape, back.seen) == (shape, embedding.seen)
    assert back.features.dtype == torch.float32
    torch.testing.assert_close(back.features, embedding.features, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"features": np.zeros((1, 32, 8, 9), np.float16)}, CheckpointError, r"\(1, 32, 8, 9\); drawn gives"),
        ({"features": np.zeros((1, 32, 8, 8), np.int64)}, CheckpointError, "int64"),
        ({"features": None}, CheckpointError, r"gives numbers of \(1, 32, 8, 8\)"),
        ({"features": np.full((1, 32, 8, 8), np.nan, np.float16)}, NonFiniteError, "NaN"),
        ({"shape": np.array([64])}, ShapeError, "expected the"),
        ({"shape": np.array([0, 64])}, ShapeError, "expected the"),
        ({"shape": np.array([32, 64])}, ShapeError, r"seen=\[64 64\]"),
        ({"shape": np.array(["a", "b"])}, ShapeError, "expected the"),
        ({"seen": None}, ShapeError, r"seen=\[\]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(sam, changed, error, said):
    arrays = sam.encode(scenes(1)[0][0]).to_arrays() | changed
    with pytest.raises(error, match=said):
        sam.embedding({name: array for name, array in arrays.items() if array is not None})


def test_features_beyond_half_precision_are_refused():
    with pytest.raises(NonFiniteError, match="float16"):
        Embedding(torch.full((1, 2, 3, 3), 1e6), (8, 8), (8, 8)).to_arrays()


@pytest.mark.parametrize(
    ("at_once", "steps"), [(7_000_000, 1), (3 * 2048, 3), (1, 8)]
)  # 2048 weights for each row of 8
def test_the_encoders_own_steps_are_the_packages(net, sam, monkeypatch, at_once, steps):
    monkeypatch.setitem(ATTENTION_AT_ONCE, "cpu", at_once)  # a row of 8 places has 2048 weights: 4 heads x 8 x 64
    image = scenes(1)[0][0]
    pixels = torch.from_numpy(image).permute(2, 0, 1).float()
    with torch.inference_mode():
        expected = net.image_encoder(net.preprocess(pixels)[None])
    calls = []
    features = sam.encode(image, pause=lambda: calls.append(1)).features
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == SIZES.depth + steps  # one of its two blocks sees all of the image


def test_a_pause_that_raises_ends_the_call(sam):
    def stop():
        raise InterruptedError

    image = scenes(1)[0][0]
    with pytest.raises(InterruptedError):
        sam.encode(image, pause=stop)
    assert sam.encode(image).shape == (SIDE, SIDE)


def test_two_encode_at_once_each_with_its_own_pause(sam):
    """Both wait for the other between blocks: neither holds what the other needs, nor sees its image."""
    images = [image for image, _, _ in scenes(2)]
    alone = [sam.encode(image).features for image in images]
    met = Barrier(2, timeout=20)
    calls = [[], []]

    def encode(i):
        return sam.encode(images[i], pause=lambda: calls[i].append(met.wait())).features

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(encode, range(2)))
    assert [len(c) for c in calls] == [SIZES.depth + 1] * 2
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert all(not torch.equal(a, b) for a, b in pairwise(together))
