import hashlib

import numpy as np
import pytest

from loop.config import PseudoConfig
from loop.errors import CheckpointError, ConfigError, StateError
from loop.pseudo.foreign import importing, loading, seen_once, version_of, weights_of, weights_path
from loop.types import Instances


@pytest.mark.parametrize("error", [ImportError, RuntimeError, AttributeError, OSError])
def test_a_package_that_does_not_import_is_named_with_its_command(error):
    with (
        pytest.raises(ConfigError, match=r"labeller x needs the package big.*because.*pip install big.*without it"),
        importing("x", "big"),
    ):
        raise error("because")


def test_other_faults_of_an_import_are_not_hidden():
    with pytest.raises(SyntaxError), importing("x", "big"):
        raise SyntaxError


@pytest.mark.parametrize("error", [OSError, KeyError, EOFError, ValueError])
def test_weights_that_a_package_refuses_are_named_with_their_setting(error):
    with (
        pytest.raises(CheckpointError, match=rf"labeller x.*'file\.pt'.*{error.__name__}.*pseudo\.weights\.x"),
        loading("x", "file.pt"),
    ):
        raise error("why")


def test_an_error_of_the_loop_keeps_its_kind_while_weights_are_read():
    with pytest.raises(StateError, match="as it was"), loading("x", "file.pt"):
        raise StateError("as it was")


def test_weights_that_are_not_set_are_refused():
    assert weights_of(PseudoConfig(weights={"x": "name"}), "x", "a name") == "name"
    for config in (PseudoConfig(), PseudoConfig(weights={"x": ""})):
        with pytest.raises(ConfigError, match=r"pseudo\.weights\.x to a name.*goes on without"):
            weights_of(config, "x", "a name")


def test_weights_must_be_there(tmp_path):
    file = tmp_path / "a.pt"
    file.write_bytes(b"1")
    assert weights_path(PseudoConfig(weights={"x": str(file)}), "x", "a file") == file
    with pytest.raises(CheckpointError, match=r"pseudo\.weights\.x.*b\.pt.*a file.*goes on without"):
        weights_path(PseudoConfig(weights={"x": str(tmp_path / "b.pt")}), "x", "a file")


def test_other_weights_are_another_version(tmp_path):
    file = tmp_path / "net.pt"
    file.write_bytes(b"one")
    assert version_of("x", file) == f"x:net-{hashlib.sha256(b'one').hexdigest()[:8]}"


@pytest.mark.parametrize("n", [0, 2])
def test_a_labeller_that_looks_once_is_stable(n):
    cells = Instances.build((4, 4), [(i, 0, i + 1, 1) for i in range(n)], [np.ones((1, 1), bool)] * n)
    proposal = seen_once(cells)
    assert proposal.instances is cells
    np.testing.assert_array_equal(proposal.stability, np.ones(n, np.float32))
