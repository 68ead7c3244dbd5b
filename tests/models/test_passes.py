import copy
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from loop.config import InstanceConfig, ModelConfig
from loop.data.intensity import stretch
from loop.data.synthetic import draw_cells
from loop.errors import ConfigError, InputError, NonFiniteError, ShapeError
from loop.masks import to_dense
from loop.models import new_net
from loop.models.passes import dropout_passes, ensemble_passes, look_again, turned_passes
from loop.models.runtime import to_input
from loop.models.segmenter import Segmenter

PIXELS, _ = draw_cells(np.random.default_rng(3), (64, 80), 6)
SMALL = InstanceConfig(tile=64, overlap=16, min_score=0.0, min_area=4)


class Brightness(nn.Module):
    """Sees bright pixels, through a normalisation with running statistics and dropout of its three maps."""

    stride = 8
    heads = ("interior", "border")

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Sequential(nn.Dropout2d(share))

    def forward(self, x):
        interior = self.drop(self.norm(x)).mean(dim=1, keepdim=True)
        return torch.cat([8 * interior - 4, torch.full_like(interior, -8)], dim=1)

    def embed(self, x):
        return x.mean(dim=(2, 3))


class Slanted(Brightness):
    """Trusts the upper half of a window less, so that turns disagree."""

    def forward(self, x):
        logits = super().forward(x)
        weight = torch.linspace(0.2, 1, x.shape[2])[:, None]
        return torch.cat([logits[:, :1] * weight, logits[:, 1:]], dim=1)


def segmenter(net=None, config=None, instances=SMALL, **fields):
    return Segmenter(net or Brightness(), config or ModelConfig(), instances, device="cpu", precision="fp32", **fields)


def trained(name="seu_net", **fields):
    model = ModelConfig(name=name, base=4, depth=2, width=8, queries=12, **fields)
    return segmenter(new_net(model, 0), model)


def test_the_first_turned_look_is_the_plain_one_and_a_net_of_single_pixels_agrees_with_itself():
    plain = segmenter().predict(PIXELS, image_id="a")
    got = turned_passes(segmenter(), PIXELS, 8, image_id="a")
    assert (got.interiors.shape, got.interiors.dtype) == ((8, *PIXELS.shape[:2]), np.float32)
    assert {cells.image_id for cells in got.looks} == {"a"}
    np.testing.assert_array_equal(got.interiors[0], segmenter().maps(PIXELS)[0])
    np.testing.assert_allclose(got.interiors, got.interiors[:1].repeat(8, axis=0), atol=1e-6)
    for cells in got.looks:
        np.testing.assert_array_equal(to_dense(cells).any(axis=0), to_dense(plain.instances).any(axis=0))


def test_turned_looks_are_turned_back():
    net = Slanted()
    got = turned_passes(segmenter(net), PIXELS, 4)
    mirrored = np.ascontiguousarray(PIXELS[::-1])
    np.testing.assert_allclose(got.interiors[2], segmenter(net).maps(mirrored)[0][::-1], atol=1e-6)
    assert np.abs(got.interiors[0] - got.interiors[2]).max() > 0.01


def test_a_segmenter_that_averages_turns_looks_once_each():
    averaging = segmenter(Slanted(), instances=SMALL.model_copy(update={"tta": 8}))
    np.testing.assert_array_equal(
        turned_passes(averaging, PIXELS, 2).interiors, turned_passes(segmenter(Slanted()), PIXELS, 2).interiors
    )
    assert averaging.instance_config.tta == 8


@pytest.mark.parametrize("name", ["seu_net", "unet", "sparse_seu_net", "pix2pix"])
def test_dropout_looks_differ_and_the_plain_prediction_stays(name):
    found = trained(name, dropout=0.5)
    before = found.maps(PIXELS)
    got = dropout_passes(found, PIXELS, 3, 5, image_id="a")
    again = dropout_passes(found, PIXELS, 3, 5)
    other = dropout_passes(found, PIXELS, 3, 6)
    assert (got.interiors.shape, got.interiors.dtype, len(got.looks)) == ((3, *PIXELS.shape[:2]), np.float32, 3)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(got.interiors[i] - got.interiors[j]).max() > 1e-4
    np.testing.assert_array_equal(got.interiors, again.interiors)
    assert not np.array_equal(got.interiors, other.interiors)
    np.testing.assert_array_equal(found.maps(PIXELS), before)


def test_norms_keep_their_statistics_and_stay_in_evaluation_mode():
    net = Brightness()
    net.norm.running_mean.fill_(0.1)
    net.norm.running_var.fill_(0.7)
    before = copy.deepcopy(net.state_dict())
    modes = {name: module.training for name, module in net.eval().named_modules()}
    found = segmenter(net)
    blanked = dropout_passes(found, PIXELS, 4).interiors
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert isinstance(net.drop[0], nn.Dropout2d)
    x = torch.from_numpy(to_input(stretch(PIXELS)))
    normed = (x - 0.1) / (0.7 + net.norm.eps) ** 0.5
    subsets = [normed * 2 * torch.tensor(kept)[:, None, None] for kept in itertools.product((0, 1), repeat=3)]
    possible = [torch.sigmoid(8 * subset.mean(dim=0) - 4).numpy() for subset in subsets]
    for look in blanked:
        assert any(np.allclose(look, other, atol=1e-5) for other in possible)


def test_a_look_blanks_the_same_maps_in_every_window_and_keeps_the_mean():
    flat = np.full((200, 200, 3), 90, np.uint8)
    flat[:2, :2] = 255
    got = dropout_passes(segmenter(), flat, 64).interiors
    assert got[:, 10:, 10:].reshape(64, -1).std(axis=1).max() < 1e-5
    z = np.log(got[:, 50, 50] / (1 - got[:, 50, 50]))
    whole = segmenter().maps(flat)[0, 50, 50]
    assert z.mean() == pytest.approx(np.log(whole / (1 - whole)), abs=4 * float(z.std()) / 8)


def test_many_threads_see_what_one_sees():
    found = trained(dropout=0.3)
    alone = dropout_passes(found, PIXELS, 2, 1).interiors
    plain = found.maps(PIXELS)
    with ThreadPoolExecutor(3) as threads:
        looks = [threads.submit(dropout_passes, found, PIXELS, 2, 1) for _ in range(3)]
        maps = [threads.submit(found.maps, PIXELS) for _ in range(3)]
        assert all(np.array_equal(look.result().interiors, alone) for look in looks)
        assert all(np.array_equal(seen.result(), plain) for seen in maps)


def test_no_global_generator_is_moved():
    found = trained(dropout=0.3)
    before = torch.random.get_rng_state()
    dropout_passes(found, PIXELS, 2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("found", [trained(), segmenter(Brightness(0.0))], ids=["seu_net", "share 0"])
def test_a_network_without_dropout_is_refused(found):
    with pytest.raises(ConfigError, match=r"model\.dropout"):
        dropout_passes(found, PIXELS, 2)


def test_an_ensemble_looks_with_each():
    first, second = trained(), segmenter(Slanted())
    got = ensemble_passes([first, second], PIXELS, image_id="a")
    np.testing.assert_array_equal(got.interiors, np.stack([first.maps(PIXELS)[0], second.maps(PIXELS)[0]]))
    plain = second.predict(PIXELS).instances
    np.testing.assert_array_equal(got.looks[1].boxes_xyxy, plain.boxes_xyxy)


def test_looking_again_tells_where_looks_disagree():
    agreeing = look_again(segmenter(), PIXELS, "turns", 4)
    apart = look_again(segmenter(Slanted()), PIXELS, "turns", 4)
    blanked = look_again(segmenter(), PIXELS, "dropout", 8)
    assert agreeing["bald"] == pytest.approx(0, abs=1e-6)
    for other in (apart, blanked):
        assert other.keys() == {"bald", "disagreement"}
        assert other["bald"] > agreeing["bald"] + 1e-4
        assert other["disagreement"] > agreeing["disagreement"]


def test_what_cannot_be_looked_at_is_refused():
    for n in (0, 9):
        with pytest.raises(InputError, match=f"n={n}"):
            turned_passes(segmenter(), PIXELS, n)
    with pytest.raises(InputError, match="n=0"):
        dropout_passes(segmenter(), PIXELS, 0)
    with pytest.raises(InputError, match="no segmenters"):
        ensemble_passes([], PIXELS)
    flat = np.zeros((20, 20), np.uint8)
    for how in ("turns", "dropout"):
        with pytest.raises(ShapeError, match=r"\(20, 20\)"):
            look_again(segmenter(), flat, how, 2)


def test_nan_is_refused_with_the_image_named():
    class Broken(Brightness):
        def forward(self, x):
            return super().forward(x) * float("nan")

    for how in ("turns", "dropout"):
        with pytest.raises(NonFiniteError, match="plate-2"):
            look_again(segmenter(Broken()), PIXELS, how, 2, "plate-2")
