import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from loop.data.weights import PUBLISHED, Published, models_folder
from loop.errors import CheckpointError, NonFiniteError, ShapeError
from loop.models import sam as module
from loop.models.sam import Sam, _import_package, batched_nms, box_area, resize, segment_anything, to_pil_image
from loop.models.sam_weights import SAM_FILES, architecture_of, build_sam, checkpoint_path, load_sam

KINDS = ("vit_b", "vit_l", "vit_h")
SIDE = 64


def small_net(*, width=32, window=3, side=SIDE, seed=0):
    """SAM's own classes with small sizes and random weights."""
    segment_anything()
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
    from segment_anything.modeling import Sam as Net

    grid = side // 16
    net = Net(
        image_encoder=ImageEncoderViT(
            depth=2,
            embed_dim=width,
            img_size=side,
            mlp_ratio=4,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            num_heads=4,
            patch_size=16,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=(1,),
            window_size=window,
            out_chans=16,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=16, image_embedding_size=(grid, grid), input_image_size=(side, side), mask_in_chans=8
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=16, mlp_dim=24, num_heads=8),
            transformer_dim=16,
            iou_head_depth=3,
            iou_head_hidden_dim=12,
        ),
    )
    generator = torch.Generator().manual_seed(seed)
    for value in net.state_dict().values():
        value.normal_(std=0.3, generator=generator)
    return net.eval()


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "small.pth"
    torch.save(small_net().state_dict(), path)
    return path


@pytest.fixture
def sam(checkpoint):
    return load_sam("vit_b", str(checkpoint), device="cpu", precision="fp32")


def pixels(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def full(crop, shape):
    mask = np.zeros(shape, bool)
    if crop is not None:
        x0, y0, x1, y1 = crop.box_xyxy
        mask[y0:y1, x0:x1] = crop.mask
    return mask


def test_nms_by_hand():
    # 0 and 1 share 90 of 110 px (IoU 9/11); 2 lies apart; 3 is box 1 in another category; 4 shares half of 2 (IoU 1/3)
    boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [1, 0, 11, 10], [20, 5, 30, 15.0]])
    scores = torch.tensor([0.9, 0.8, 0.3, 0.7, 0.95])
    category = torch.tensor([0.0, 0, 0, 1, 0])
    assert batched_nms(boxes, scores, category, 0.7).tolist() == [4, 0, 3, 2]
    assert batched_nms(boxes, scores, category, 0.3).tolist() == [4, 0, 3]
    assert batched_nms(boxes, scores, torch.zeros(5), 9 / 11).tolist()[:2] == [4, 0]
    assert batched_nms(boxes, scores, torch.zeros(5), 0.0).tolist() == [4, 0]
    assert batched_nms(boxes[:0], scores[:0], category[:0], 0.5).tolist() == []


def test_nms_keeps_a_box_at_the_threshold():
    boxes = torch.tensor([[0, 0, 2, 1], [0, 0, 1, 1.0]])
    assert batched_nms(boxes, torch.tensor([1.0, 0.5]), torch.zeros(2), 0.5).tolist() == [0, 1]


def test_box_area_by_hand():
    assert box_area(torch.tensor([[0, 0, 3, 4], [1, 1, 1, 5], [2, 3, 4, 4.0]])).tolist() == [12, 0, 2]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(64, 48), (13, 200)])
def test_resize_is_pils(channels, size):
    image = pixels(40, 30, channels)
    given = Image.fromarray(image[:, :, 0] if channels == 1 else image)
    expected = np.asarray(given.resize((size[1], size[0]), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(np.asarray(resize(to_pil_image(image), size)).astype(int) - expected).max() <= 1


def test_resize_of_a_ramp_stays_a_ramp():
    ramp = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 8, axis=0)
    twice = np.asarray(resize(to_pil_image(ramp), (16, 120)))[8].astype(int)
    assert np.abs(twice[2:-2] - (2 * np.arange(120)[2:-2] - 1)).max() <= 1


def test_a_broken_torchvision_is_stood_in_for_and_nobody_is_fooled(tmp_path):
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code = (
        "import sys, importlib.util\n"
        "from loop.models.sam import segment_anything\n"
        "package = segment_anything()\n"
        "assert package.automatic_mask_generator.batched_nms.__module__ == 'loop.models.sam'\n"
        "assert not [name for name in sys.modules if name.startswith('torchvision')]\n"
        f"assert importlib.util.find_spec('torchvision').origin.startswith({str(tmp_path)!r})\n"
        "try:\n    import torchvision\nexcept RuntimeError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": f"{tmp_path}"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "torchvision::nms" in done.stdout


def test_a_torchvision_that_imports_is_used(tmp_path, monkeypatch):
    for name, text in {
        "__init__": "",
        "ops/__init__": "",
        "ops/boxes": "def batched_nms(): ...\ndef box_area(): ...",
        "transforms/__init__": "",
        "transforms/functional": "def resize(): ...\ndef to_pil_image(): ...",
    }.items():
        path = tmp_path / "torchvision" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    kept = {name: m for name, m in sys.modules.items() if name.split(".")[0] in ("segment_anything", "torchvision")}
    for name in kept:
        monkeypatch.delitem(sys.modules, name)
    try:
        package = _import_package()
        assert package.automatic_mask_generator.batched_nms.__module__ == "torchvision.ops.boxes"
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in ("segment_anything", "torchvision")]:
            del sys.modules[name]
        sys.modules.update(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_kinds_are_the_packages_own(kind):
    with torch.device("meta"):
        theirs = segment_anything().sam_model_registry[kind]()
    ours = build_sam(architecture_of(theirs.state_dict()))
    shapes = [{name: tuple(value.shape) for name, value in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert str(ours) == str(theirs)
    for one, other in zip(ours.modules(), theirs.modules(), strict=True):
        plain = [
            {k: v for k, v in vars(m).items() if isinstance(v, (int, float, tuple)) and k != "training"}
            for m in (one, other)
        ]
        assert plain[0] == plain[1]
    assert ours.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])


def test_a_small_checkpoint_loads_and_says_which(checkpoint, sam):
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert sam.version == f"vit_b-{digest[:8]}"
    assert sam.side == SIDE
    stored = torch.load(checkpoint)
    assert all(torch.equal(value, stored[name]) for name, value in sam._net.state_dict().items())


@pytest.mark.parametrize("window", [3, 4])
@pytest.mark.parametrize(("height", "width"), [(40, 56), (64, 64), (150, 90)])
def test_masks_are_those_of_the_packages_predictor(tmp_path, window, height, width):
    net = small_net(window=window)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    ours = load_sam("vit_b", str(tmp_path / "w.pth"), device="cpu", precision="fp32")
    image = pixels(height, width)
    predictor = segment_anything().SamPredictor(net)
    predictor.set_image(image)
    embedding = ours.encode(image)
    torch.testing.assert_close(embedding.features, predictor.features, atol=1e-4, rtol=1e-4)
    scale = np.array(embedding.seen[::-1]) / (width, height)
    points, box = np.array([[12.5, 20.0], [30.0, 9.5]]), np.array([5.0, 6.0, 33.0, 30.0])
    labels = np.array([1, 0])
    for use_points, use_box, multimask in ((1, 1, True), (1, 0, True), (0, 1, False)):
        masks, scores, _ = predictor.predict(
            point_coords=points - 0.5 / scale if use_points else None,
            point_labels=labels if use_points else None,
            box=box - 0.5 / np.tile(scale, 2) if use_box else None,
            multimask_output=multimask,
            return_logits=True,
        )
        answers = ours.decode(
            embedding,
            points=points[None] if use_points else None,
            point_labels=labels[None] if use_points else None,
            boxes=box[None] if use_box else None,
            multimask=multimask,
        )
        np.testing.assert_allclose(answers.scores[0], np.clip(scores, 0, 1), atol=1e-4)
        for crop, stable, logits in zip(answers.crops[0], answers.stability[0], masks, strict=True):
            sure = np.abs(logits) > 1e-3
            assert np.array_equal(full(crop, (height, width))[sure], (logits > 0)[sure])
            assert stable == pytest.approx((logits > 1).sum() / max(1, (logits > -1).sum()), abs=0.01)


def test_all_masks_are_the_three_and_then_the_one_for_clear_prompts(sam):
    embedding = sam.encode(pixels(50, 70))
    points = np.random.default_rng(2).uniform(0, 50, (5, 1, 2))
    every, three, one = (sam.decode(embedding, points=points, multimask=kind) for kind in ("all", True, False))
    np.testing.assert_allclose(every.scores, np.hstack([three.scores, one.scores]), atol=1e-5)
    np.testing.assert_allclose(every.stability, np.hstack([three.stability, one.stability]), atol=0.01)
    assert [len(crops) for crops in every.crops] == [4] * 5
    assert sam.decode(embedding, points=points[:0], multimask="all").scores.shape == (0, 4)


def test_batches_do_not_change_an_answer(sam, monkeypatch):
    embedding = sam.encode(pixels(50, 70))
    points = np.random.default_rng(1).uniform(0, 50, (9, 1, 2))
    whole = sam.decode(embedding, points=points)
    monkeypatch.setitem(module.PROMPTS_A_BATCH, "cpu", 4)
    parts = sam.decode(embedding, points=points)
    np.testing.assert_allclose(whole.scores, parts.scores, atol=1e-5)
    np.testing.assert_allclose(whole.stability, parts.stability, atol=0.01)
    assert whole.scores.shape == (9, 3)
    assert len(parts.crops) == 9


def test_unwanted_masks_are_left_out(sam):
    embedding = sam.encode(pixels(50, 70))
    points = np.random.default_rng(1).uniform(0, 50, (9, 1, 2))
    everything = sam.decode(embedding, points=points)
    middle = (float(np.median(everything.scores)), float(np.median(everything.stability)))
    some = sam.decode(embedding, points=points, least=middle)
    for i in range(9):
        for j in range(3):
            wanted = everything.scores[i, j] >= middle[0] and everything.stability[i, j] >= middle[1]
            assert (some.crops[i][j] is not None) == (wanted and everything.crops[i][j] is not None)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 1, 1), (1, 500, 3), (300, 2, 1), (64, 64, 1)])
@pytest.mark.parametrize("value", [None, 0, 255])
def test_any_image(sam, shape, value):
    image = pixels(*shape) if value is None else np.full(shape, value, np.uint8)
    answers = sam.decode(sam.encode(image), points=[[[0.5, 0.5]]], boxes=[[0, 0, shape[1], shape[0]]])
    for crop in answers.crops[0]:
        assert crop is None or (crop.box_xyxy[2] <= shape[1] and crop.box_xyxy[3] <= shape[0])


def test_grey_is_the_same_as_three_equal_channels(sam):
    grey = pixels(30, 40, 1)
    assert torch.equal(sam.encode(grey).features, sam.encode(np.repeat(grey, 3, axis=2)).features)


def test_bf16_is_close_to_fp32(checkpoint, sam):
    half = load_sam("vit_b", str(checkpoint), device="cpu", precision="bf16")
    image = pixels(60, 60)
    one, other = half.encode(image).features, sam.encode(image).features
    assert one.dtype == torch.float32
    assert 0 < float((one - other).abs().mean()) < 0.1 * float(other.abs().mean())


def test_no_prompts_no_masks(sam):
    answers = sam.decode(sam.encode(pixels(20, 20)), boxes=np.zeros((0, 4)))
    assert answers.crops == ()
    assert answers.scores.shape == answers.stability.shape == (0, 3)


@pytest.mark.parametrize(
    "prompts",
    [
        {},
        {"points": np.zeros((2, 2))},
        {"points": [1, 2]},
        {"points": np.zeros((2, 1, 2)), "point_labels": np.zeros((2, 2))},
        {"boxes": np.zeros((2, 3))},
        {"points": np.zeros((2, 1, 2)), "boxes": np.zeros((3, 4))},
    ],
)
def test_prompts_of_another_shape_are_refused(sam, prompts):
    with pytest.raises(ShapeError, match="expected points"):
        sam.decode(sam.encode(pixels(20, 20)), **prompts)


@pytest.mark.parametrize("shape", [(20, 20), (0, 20, 3), (20, 20, 4)])
def test_images_of_another_shape_are_refused(sam, shape):
    with pytest.raises(ShapeError, match="expected"):
        sam.encode(np.zeros(shape, np.uint8))


def test_threads_share_one(sam):
    images = [pixels(40, 40, seed=seed) for seed in range(4)]

    def ask(image):
        return sam.decode(sam.encode(image), points=[[[20.0, 20.0]]]).scores

    alone = [ask(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, images * 3))
    for scores, expected in zip(together, alone * 3, strict=True):
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_nan_is_refused():
    broken = small_net()
    with torch.no_grad():
        broken.image_encoder.neck[0].weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="encoder"):
        Sam(broken, version="x", device="cpu").encode(pixels(20, 20))
    deaf = small_net()
    with torch.no_grad():
        deaf.mask_decoder.iou_token.weight.fill_(float("nan"))
    sam = Sam(deaf, version="x", device="cpu")
    with pytest.raises(NonFiniteError, match="decoder"):
        sam.decode(sam.encode(pixels(20, 20)), points=[[[1.0, 1.0]]])


@pytest.mark.parametrize("kind", KINDS)
def test_no_checkpoint_says_where_from_and_that_the_loop_goes_on(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("CELLOOP_HOME", str(tmp_path))
    published = PUBLISHED[SAM_FILES[kind]]
    with pytest.raises(CheckpointError) as caught:
        load_sam(kind)
    for part in (str(models_folder() / SAM_FILES[kind]), published.url, published.sha256, "goes on without SAM"):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match=r"nowhere\.pth is not there"):
        checkpoint_path(kind, "nowhere.pth")


def test_a_file_in_the_home_of_nobody_is_refused():
    with pytest.raises(CheckpointError, match=r"~no-such-person-here/w\.pth.*name another file"):
        checkpoint_path("vit_b", "~no-such-person-here/w.pth")


def test_a_file_under_a_published_name_must_be_as_published(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("CELLOOP_HOME", str(tmp_path))
    path = models_folder() / SAM_FILES["vit_b"]
    path.parent.mkdir()
    path.write_bytes(checkpoint.read_bytes())
    with pytest.raises(CheckpointError, match=r"not what is published.*ec2df627"):
        load_sam("vit_b", device="cpu")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(PUBLISHED, path.name, Published("http://x", digest, path.stat().st_size))
    assert load_sam("vit_b", device="cpu").version == f"vit_b-{digest[:8]}"


@pytest.mark.parametrize("damage", ["half", "empty", "text"])
def test_a_truncated_file_is_named(checkpoint, damage):
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "text": b"no weights"}[damage])
    with pytest.raises(CheckpointError, match=r"small\.pth is truncated or no checkpoint"):
        load_sam("vit_b", str(checkpoint))


def saved(path, state):
    torch.save(state, path)
    return str(path)


def test_other_contents_are_named(tmp_path):
    path, state = tmp_path / "w.pth", small_net().state_dict()
    for content, said in (
        ({"model": state}, "holds a dict of model"),
        ([1, 2], "holds list"),
        ({}, "holds a dict of"),
        ({"conv1.weight": torch.zeros(3)}, "no weights of a SAM: without image_encoder"),
        ({**state, "image_encoder.pos_embed": torch.zeros(3)}, "without image_encoder.pos_embed"),
        ({k: v for k, v in state.items() if k != "mask_decoder.iou_token.weight"}, "no mask_decoder.iou_token.weight"),
        ({**state, "head.weight": torch.zeros(1)}, "unknown head.weight"),
        (
            {**state, "mask_decoder.iou_token.weight": torch.zeros(1, 7)},
            r"size of mask_decoder.iou_token.weight \(1, 7\), expected \(1, 16\)",
        ),
        ({**state, "image_encoder.neck.0.weight": torch.zeros(9, 32, 1, 1)}, "sizes that no SAM has|size of"),
        ({**state, "mask_decoder.iou_token.weight": torch.full((1, 16), float("nan"))}, "holds NaN"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load_sam("vit_b", saved(path, content))


def test_another_kind_is_named(tmp_path):
    state = small_net(width=1024).state_dict()
    blocks = {k.replace(".1.", f".{i}.", 1): v for k, v in state.items() if ".blocks.1." in k for i in range(2, 24)}
    with pytest.raises(CheckpointError, match=r"is a vit_l, the setting says vit_b; set pseudo.sam.kind to vit_l"):
        load_sam("vit_b", saved(tmp_path / "w.pth", {**state, **blocks}))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_sam("vit_b", saved(tmp_path / "w.pth", {"a": Evil()}))
