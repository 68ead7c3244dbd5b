from pathlib import Path

import pytest
import yaml

from loop.config import LoopConfig, load_config
from loop.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"


def test_loop_yaml_states_every_setting_with_its_default() -> None:
    written = yaml.safe_load((CONFIGS / "loop.yaml").read_text())
    assert written == LoopConfig().model_dump(mode="json")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    load_config(path)


def test_a_file_changes_what_it_names_and_overrides_change_more(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  minutes: 7\n  seed: 3\n")
    config = load_config(path, {"train.seed": 5, "select.batch": None})
    assert (config.train.minutes, config.train.seed, config.select.batch) == (7.0, 5, LoopConfig().select.batch)


def test_an_unknown_key_is_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  minuts: 7\n")
    with pytest.raises(ConfigError, match=r"train\.minuts"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "list"),
        ("a: [", "no YAML"),
        ("train: {crop: 100}", "multiple of 16"),
        ("train: {minutes: -1}", "-1"),
        ("select: {annotators: [ann, bo, ann]}", "somebody twice"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(path)


def test_a_file_that_is_no_text_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"train: {minutes: \xff}")
    with pytest.raises(ConfigError, match="no YAML"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_an_override_of_something_that_is_no_group_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {minutes: 7}")
    with pytest.raises(ConfigError, match="minutes holds a value"):
        load_config(path, {"train.minutes.more": 1})
