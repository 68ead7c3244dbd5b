import csv
import os

import numpy as np
import pytest
import tifffile
from replay_stage import drawn_folder

from loop.data.folder import open_folder, read_sample
from loop.data.store import read_image, write_label_image, write_label_layers, write_png
from loop.errors import InputError
from loop.masks import to_dense
from loop.replay import pool
from loop.replay.pool import cut, open_replay


def by_name(folder):
    return {ref.image_id: ref for ref in open_folder(folder).images}


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stacked(instances):
    """Its masks as a set, whatever their order."""
    return {mask.tobytes() for mask in to_dense(instances)}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Pictures of 70 x 90 px, and one that is smaller than any window."""
    root = drawn_folder(tmp_path_factory.mktemp("wide"), {"a": "pool", "b": "pool", "c": "test"}, (70, 90), 12)
    rng = np.random.default_rng(5)
    write_png(rng.integers(0, 256, (20, 30, 3)).astype(np.uint8), root / "images" / "s.png")
    labels = np.zeros((20, 30), np.int32)
    labels[3:9, 3:12] = 7
    write_label_image(labels, root / "labels" / "s.png")
    with (root / "manifest.csv").open("w") as file:
        file.write(
            "image,split,group,modality\na.png,pool,g1,dark\nb.png,pool,g1,dark\nc.png,test,,pink\ns.png,pool,,\n"
        )
    return root


def place(whole, window):
    """Where `window` lies in `whole`: found by looking everywhere."""
    height, width = window.shape[:2]
    return [
        (top, left)
        for top in range(whole.shape[0] - height + 1)
        for left in range(whole.shape[1] - width + 1)
        if np.array_equal(whole[top : top + height, left : left + width], window)
    ]


def test_labels_are_those_of_the_pixels(wide, tmp_path):
    target = cut(wide, tmp_path, 40)
    assert target == tmp_path / "40"
    old, new = by_name(wide), by_name(target)
    assert set(old) == set(new)
    for name in ("a", "b", "c"):
        whole, window = read_image(old[name].path).pixels, read_image(new[name].path).pixels
        assert window.shape[:2] == (40, 40)
        ((top, left),) = place(whole, window)
        cropped = to_dense(read_sample(old[name]).instances)[:, top : top + 40, left : left + 40]
        expected = {mask.tobytes() for mask in cropped if mask.sum() >= 10}
        assert 0 < len(expected) < 12
        assert stacked(read_sample(new[name]).instances) == expected


def test_windows_of_equal_pictures_lie_at_different_places(wide, tmp_path):
    target = cut(wide, tmp_path, 40)
    places = {
        place(read_image(by_name(wide)[n].path).pixels, read_image(by_name(target)[n].path).pixels)[0] for n in "abc"
    }
    assert len(places) == 3


def test_group_modality_and_split_stay(wide, tmp_path):
    new = by_name(cut(wide, tmp_path, 40))
    known = {name: (ref.group, ref.modality, ref.split) for name, ref in new.items()}
    assert known == {
        "a": ("g1", "dark", "pool"),
        "b": ("g1", "dark", "pool"),
        "c": ("", "pink", "test"),
        "s": ("", "", "pool"),
    }


def test_a_small_image_stays_whole(wide, tmp_path):
    old, new = by_name(wide)["s"], by_name(cut(wide, tmp_path, 40))["s"]
    np.testing.assert_array_equal(read_image(new.path).pixels, read_image(old.path).pixels)
    assert stacked(read_sample(new).instances) == stacked(read_sample(old).instances)


def test_the_same_again_and_whatever_else_is_in_the_folder(wide, tmp_path):
    first, again = cut(wide, tmp_path / "1", 40), cut(wide, tmp_path / "2", 40)
    assert files(first) == files(again)
    fewer = tmp_path / "fewer"
    for part, suffix in (("images", "png"), ("labels", "png")):
        (fewer / part).mkdir(parents=True)
        os.link(wide / part / f"b.{suffix}", fewer / part / f"b.{suffix}")
    alone = cut(fewer, tmp_path / "3", 40)
    assert (alone / "images" / "b.png").read_bytes() == (first / "images" / "b.png").read_bytes()
    assert (alone / "labels" / "b.tif").read_bytes() == (first / "labels" / "b.tif").read_bytes()


def test_overlapping_cells_and_small_pieces(tmp_path):
    write_png(np.zeros((32, 32), np.uint8), tmp_path / "images" / "a.png")
    layers = np.zeros((2, 32, 32), np.uint16)
    layers[0, 2:12, 2:12] = 1
    layers[1, 6:20, 6:20] = 2  # on the first one's corner
    layers[0, 25:28, 25:28] = 3  # 9 px
    layers[0, 22:24, 2:7] = 4  # 10 px
    write_label_layers(layers, tmp_path / "labels" / "a.tif")
    found = read_sample(by_name(cut(tmp_path, tmp_path / "out", 32))["a"]).instances
    assert stacked(found) == {(layers == value).any(axis=0).tobytes() for value in (1, 2, 4)}


def test_an_image_without_cells_stays_one_without_cells(tmp_path):
    write_png(np.zeros((40, 40), np.uint8), tmp_path / "images" / "a.png")
    write_label_image(np.zeros((40, 40), np.int32), tmp_path / "labels" / "a.png")
    new = by_name(cut(tmp_path, tmp_path / "out", 32))["a"]
    assert new.label_path is not None
    assert len(read_sample(new).instances) == 0
    assert tifffile.imread(new.label_path).shape == (32, 32)


def test_an_image_without_label_is_left_out_and_progress_told(wide, tmp_path):
    write_png(np.zeros((40, 40), np.uint8), tmp_path / "images" / "a.png")
    write_label_image(np.zeros((40, 40), np.int32), tmp_path / "labels" / "a.png")
    write_png(np.zeros((40, 40), np.uint8), tmp_path / "images" / "b.png")
    told = []
    new = cut(tmp_path, tmp_path / "out", 32, lambda done, total: told.append((done, total)))
    assert list(by_name(new)) == ["a"]
    assert told == [(1, 1)]


def test_a_complete_folder_is_kept(wide, tmp_path, monkeypatch):
    target = cut(wide, tmp_path, 40)
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    monkeypatch.setattr(pool, "_cut_one", None)
    assert cut(wide, tmp_path, 40) == target
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before


def test_a_folder_killed_before_its_manifest_is_made_again(wide, tmp_path, monkeypatch):
    whole = files(cut(wide, tmp_path / "whole", 40))
    real, done = pool._cut_one, []

    class Killed(BaseException):
        pass

    def two_only(*given):
        if len(done) == 2:
            raise Killed
        done.append(given)
        return real(*given)

    monkeypatch.setattr(pool, "_cut_one", two_only)
    with pytest.raises(Killed):
        cut(wide, tmp_path / "killed", 40)
    (tmp_path / "killed" / "40" / "images" / "stray.png").write_bytes(b"half")
    monkeypatch.setattr(pool, "_cut_one", real)
    assert files(cut(wide, tmp_path / "killed", 40)) == whole


def test_windows_of_two_sizes_stand_beside_each_other(wide, tmp_path):
    cut(wide, tmp_path, 40)
    cut(wide, tmp_path, 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["32", "40"]


def test_what_cannot_be_cut_is_refused(wide, tmp_path):
    with pytest.raises(InputError, match="windows of 31 px; give 32 or more"):
        cut(wide, tmp_path / "out", 31)
    write_png(np.zeros((40, 40), np.uint8), tmp_path / "data" / "images" / "a.png")
    with pytest.raises(InputError, match="has no labelled image"):
        cut(tmp_path / "data", tmp_path / "out", 32)
    with pytest.raises(InputError, match="does not exist"):
        cut(tmp_path / "nowhere", tmp_path / "out", 32)


def names(samples):
    return [sample.image.image_id for sample in samples]


def noted(root, rows):
    """The drawn folder with another manifest."""
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "split", "group", "modality"])
        writer.writerows((f"{stem}.png", *rest) for stem, *rest in rows)


def test_pool_and_test_are_by_split(tmp_path):
    splits = {"a": "pool", "b": "train", "c": "", "v": "val", "x": "test"}
    data = drawn_folder(tmp_path, splits)
    write_png(np.zeros((64, 64), np.uint8), data / "images" / "open.png")
    found = open_replay(data)
    assert (names(found.pool), names(found.test)) == (["a", "b", "c"], ["x"])
    assert names(open_replay(data, measure="val").test) == ["v"]
    assert [len(sample.instances) for sample in found.pool] == [4, 4, 4]


def test_a_group_of_two_splits_is_not_chosen_from(tmp_path):
    data = drawn_folder(tmp_path, dict.fromkeys("abcx", "pool"))
    noted(data, [("a", "pool", "g", ""), ("b", "train", "h", ""), ("c", "pool", "h", ""), ("x", "test", "g", "")])
    found = open_replay(data)
    assert (names(found.pool), names(found.test)) == (["b", "c"], ["x"])


def test_only_one_modality(tmp_path):
    data = drawn_folder(tmp_path, dict.fromkeys("abxy", "pool"))
    noted(data, [("a", "pool", "", "m"), ("b", "pool", "", "n"), ("x", "test", "", "m"), ("y", "test", "", "n")])
    found = open_replay(data, modality="n")
    assert (names(found.pool), names(found.test)) == (["b"], ["y"])
    with pytest.raises(InputError, match="0 labelled images of modality o to choose from"):
        open_replay(data, modality="o")


def test_a_missing_split_is_named(tmp_path):
    data = drawn_folder(tmp_path, {"a": "pool", "x": "test"})
    with pytest.raises(InputError, match=r"1 labelled images to choose from \(split pool\), 0 .*\(split val\)"):
        open_replay(data, measure="val")
    (data / "manifest.csv").unlink()
    with pytest.raises(InputError, match=r"\(split test\).*give manifest.csv a column split"):
        open_replay(data)
