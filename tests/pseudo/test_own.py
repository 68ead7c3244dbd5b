import numpy as np
import pytest
import torch
from torch import nn

from loop.config import InstanceConfig, ModelConfig, PseudoConfig
from loop.data.synthetic import draw_cells
from loop.errors import InputError, NonFiniteError, ShapeError
from loop.masks import from_masks, to_dense
from loop.metrics.matching import iou_matrix
from loop.models import new_net
from loop.models.segmenter import Segmenter
from loop.pseudo.base import Tools
from loop.pseudo.own import VIEWS, OwnLabeller, own, stability_of

CONFIG = ModelConfig(base=4, depth=2, width=8, queries=8)


class Bright(nn.Module):
    """A network that takes bright pixels for cells, less sure of them towards the right if it is `crooked`."""

    heads = ("interior",)
    stride = 1

    def __init__(self, crooked=0.0, broken=False):
        super().__init__()
        self.crooked, self.broken, self.calls = crooked, broken, 0

    def forward(self, x):
        self.calls += 1
        slope = torch.linspace(0, self.crooked, x.shape[-1])
        logits = 12 * (x.mean(dim=1, keepdim=True) - 0.35) - slope
        return logits * torch.nan if self.broken else logits


def segmenter(net, config=CONFIG, **thresholds):
    chosen = InstanceConfig(**{"tile": 64, "min_area": 8, "overlap": 16, **thresholds})
    return Segmenter(net, config, chosen, device="cpu", precision="fp32", model_version="v7")


def found(cells, true):
    return iou_matrix(cells, true).max(axis=0, initial=0)


def test_a_network_that_turning_does_not_disturb_is_stable():
    drawn = draw_cells(np.random.default_rng(0), (64, 80), 5)
    net = Bright()
    labeller = OwnLabeller("champion", segmenter(net), views=8)
    cells, stability = labeller.propose(drawn.pixels, image_id="a")
    assert net.calls == 8 * 2  # views times windows
    assert (found(cells, drawn.instances) > 0.6).all()
    assert (stability[iou_matrix(cells, drawn.instances).max(axis=1) > 0.6] > 0.8).all()
    assert (cells.source, cells.model_version, cells.image_id) == ("pseudo", "v7", "a")
    assert (labeller.name, labeller.version, labeller.needs_hint) == ("champion", "v7", False)


def test_cells_that_come_and_go_with_the_view_are_unstable():
    image = np.zeros((64, 64, 3), np.uint8)
    image[28:38, 6:16] = 255
    image[28:38, 46:56] = 120
    steady, _ = OwnLabeller("a", segmenter(Bright()), views=1).propose(image)
    cells, stability = OwnLabeller("a", segmenter(Bright(crooked=2.2)), views=4).propose(image)
    assert len(steady) == len(cells) == 2
    left, right = np.argsort(cells.boxes_xyxy[:, 0])
    assert stability[left] > stability[right] + 0.1
    assert cells.scores[left] > cells.scores[right]


def test_weak_cells_are_proposed_too():
    image = np.zeros((64, 64, 3), np.uint8)
    image[0:4, 0:4] = 255
    image[28:38, 46:56] = 120  # the network gives it 0.81
    strict = segmenter(Bright(), min_score=0.95, tta=8)
    assert len(strict.cells(strict.look(image))) == 1
    proposed = OwnLabeller("a", strict, views=1).propose(image).instances
    np.testing.assert_allclose(proposed.scores, [1, 0.81], atol=0.01)
    assert (strict.instance_config.min_score, strict.instance_config.tta) == (0.95, 8)  # not changed


@pytest.mark.parametrize("views", VIEWS)
def test_views_are_distinct_and_begin_with_the_image_itself(views):
    assert len(set(VIEWS[views])) == len(VIEWS[views]) == (6 if views == 7 else views)
    assert VIEWS[views][0] == 0


@pytest.mark.parametrize("name", ["unet", "seu_net", "sparse_seu_net", "pix2pix"])
@pytest.mark.parametrize("shape", [(64, 64, 3), (1, 1, 1), (40, 70, 1)])
def test_every_kind_of_network_proposes_in_images_of_any_size(name, shape):
    heads = ("interior", "border", "distance") if name == "pix2pix" else CONFIG.heads
    config = CONFIG.model_copy(update={"name": name, "heads": heads})
    tools = Tools(PseudoConfig(views=4), "cpu", lambda kind: segmenter(new_net(config, 3), config))
    labeller = own(name)(tools)
    image = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
    cells, stability = labeller.propose(image)
    assert cells.shape == shape[:2]
    assert stability.shape == (len(cells),)
    assert stability.dtype == np.float32
    assert ((stability >= 0) & (stability <= 1)).all()
    assert ((cells.scores >= 0) & (cells.scores <= 1)).all()
    assert labeller.name == name


def test_sparse_scores_are_those_of_the_views_that_found_the_cell():
    config = CONFIG.model_copy(update={"name": "sparse_seu_net"})
    one = segmenter(new_net(config, 3), config)
    image = draw_cells(np.random.default_rng(3), (64, 64), 3).pixels
    single = OwnLabeller("a", one, views=1).propose(image)
    expected = one.look(image).instances
    np.testing.assert_array_equal(to_dense(single.instances), to_dense(expected))
    np.testing.assert_allclose(single.instances.scores, expected.scores)
    np.testing.assert_array_equal(single.stability, np.ones(len(expected)))


def test_stability_by_hand():
    masks = np.zeros((3, 10, 20), bool)
    masks[0, 0:4, 0:10] = masks[1, 0:4, 0:6] = masks[2, 0:4, 0:4] = True  # IoU with the first 1, 0.6, 0.4
    cell, *others = (from_masks([mask], (10, 20)) for mask in masks)
    nothing = from_masks([], (10, 20))
    np.testing.assert_allclose(stability_of(cell, [cell, *others, nothing]), [(1 + 0.6) / 4], rtol=1e-6)
    assert stability_of(nothing, [cell]).shape == (0,)


def test_what_cannot_be_looked_at_is_refused():
    with pytest.raises(InputError, match="views=3"):
        OwnLabeller("a", segmenter(Bright()), views=3)
    with pytest.raises(NonFiniteError, match="'x'"):
        OwnLabeller("a", segmenter(Bright(broken=True))).propose(np.zeros((8, 8, 1), np.uint8), image_id="x")
    for shape in ((8, 8), (8, 8, 2)):
        with pytest.raises(ShapeError):
            OwnLabeller("a", segmenter(Bright())).propose(np.zeros(shape, np.uint8))
