import json

import pytest
import torch

from loop.config import InstanceConfig, ModelConfig
from loop.models import new_net
from loop.models.blocks import LevelDropout
from loop.models.sparse_seu_net import SparseOutput
from loop.training.checkpoint import DESCRIPTION, load_checkpoint, save_checkpoint

NAMES = pytest.mark.parametrize("name", ["unet", "seu_net", "sparse_seu_net"])
X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def net(name, dropout):
    return new_net(ModelConfig(name=name, base=4, depth=2, width=8, queries=12, dropout=dropout), 0)


def output(network):
    with torch.no_grad():
        found = network(X)
    return found.masks if isinstance(found, SparseOutput) else found


@NAMES
def test_without_it_training_mode_sees_what_evaluation_mode_sees_and_no_chance_is_used(name):
    plain, without = net(name, 0.5).eval(), net(name, 0.0).train()
    before = torch.random.get_rng_state()
    assert torch.equal(output(plain), output(without))
    assert list(plain.state_dict()) == list(without.state_dict())
    assert torch.equal(torch.random.get_rng_state(), before)


@NAMES
def test_with_it_training_mode_is_blanked_at_random_and_the_embedding_is_not(name):
    network = net(name, 0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network.train()
        first, second = output(network), output(network)
    assert not torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(network.embed(X), network.eval().embed(X))


def test_whole_maps_of_the_two_coarsest_levels_are_blanked():
    features = [torch.ones(3, 50, side, side) for side in (8, 4, 2)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        finest, *coarse = LevelDropout(0.2).train()(features)
    assert torch.equal(finest, features[0])
    for part in coarse:
        assert sorted(part.unique().tolist()) == pytest.approx([0, 1.25])
        assert torch.equal(part.amax(dim=(2, 3)), part.amin(dim=(2, 3)))
        assert 0.1 < (part == 0).float().mean() < 0.3


def test_a_checkpoint_of_before_dropout_loads(tmp_path):
    config = ModelConfig(base=4, depth=2)
    old = new_net(config, 0).eval()
    save_checkpoint(tmp_path, old, config, InstanceConfig())
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    del description["model"]["dropout"]
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    loaded = load_checkpoint(tmp_path, device="cpu")
    assert loaded.model_config == config
    assert torch.equal(output(loaded.net), output(old))
