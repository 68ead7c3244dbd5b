import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loop.data.folder import leaking_groups, open_folder, read_labels
from loop.data.store import write_label_image, write_png
from loop.data.synthetic import draw_cells
from loop.errors import ImageError, InputError, LabelError
from loop.masks import to_dense, to_label_image
from loop.types import ImageRef


@pytest.fixture
def folder(tmp_path):
    """Three drawn images a, b, c with labels; b has no cells."""
    for seed, (stem, n) in enumerate({"a": 3, "b": 0, "c": 2}.items()):
        pixels, cells = draw_cells(np.random.default_rng(seed), (32, 48), n)
        write_png(pixels, tmp_path / "images" / f"{stem}.png")
        write_label_image(to_label_image(cells), tmp_path / "labels" / f"{stem}.png")
    return tmp_path


def _manifest(folder, rows, columns=("image", "label", "modality", "height", "group", "split")):
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows])


def _reasons(opened):
    return {problem.path.name: problem.reason for problem in opened.problems}


def test_images_and_labels_without_a_manifest(folder):
    opened = open_folder(folder)
    assert [ref.image_id for ref in opened.images] == ["a", "b", "c"]
    assert opened.problems == ()
    a = opened.images[0]
    assert (a.height, a.width, a.channels, a.group, a.split, a.modality) == (32, 48, 3, "", "", "")
    assert a.path == folder / "images" / "a.png"
    assert a.label_path == folder / "labels" / "a.png"
    cells = read_labels(a)
    assert (cells.image_id, cells.source, len(cells)) == ("a", "human", 3)
    np.testing.assert_array_equal(to_dense(cells), to_dense(draw_cells(np.random.default_rng(0), (32, 48), 3)[1]))
    assert len(read_labels(opened.images[1])) == 0


def test_images_in_the_folder_itself_and_labels_left_alone(folder):
    for name in ("a.png", "b.png"):
        (folder / "images" / name).rename(folder / name)
    (folder / "images" / "c.png").unlink()
    (folder / "images").rmdir()
    (folder / "notes.txt").write_text("taken on Monday")
    opened = open_folder(folder)
    assert [ref.label_path for ref in opened.images] == [folder / "labels" / "a.png", folder / "labels" / "b.png"]
    assert list(_reasons(opened)) == ["c.png"]
    without = open_folder(folder, labels=False)
    assert [ref.label_path for ref in without.images] == [None, None]
    assert without.problems == ()


def test_the_manifest_gives_group_split_modality_and_keeps_the_rest(folder):
    _manifest(folder, [["images/a.png", "labels/c.png", "dark", "32", "s1", "pool"], ["c.png", "", "", "", "", ""]])
    opened = open_folder(folder)
    a, b, c = opened.images
    assert (a.group, a.split, a.modality, a.extra) == ("s1", "pool", "dark", {"height": "32"})
    assert a.label_path == folder / "labels" / "c.png"
    assert (c.group, c.extra, c.label_path) == ("", {"height": ""}, folder / "labels" / "c.png")
    assert (b.group, b.extra, b.label_path) == ("", {}, folder / "labels" / "b.png")
    assert "1 images are not listed (b.png)" in _reasons(opened)["manifest.csv"]


def test_every_bad_file_is_named_and_the_others_are_kept(folder):
    images = folder / "images"
    (images / "empty.png").write_bytes(b"")
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:300])
    (images / "text.tif").write_text("no tiff")
    (images / "slide.czi").write_bytes(b"ZISRAWFILE")
    (images / ".hidden.png").write_bytes(b"")
    (images / "deeper").mkdir()
    seen = []
    opened = open_folder(folder, progress=lambda done, total: seen.append((done, total)))
    assert [ref.image_id for ref in opened.images] == ["a", "b", "c"]
    reasons = _reasons(opened)
    assert sorted(reasons) == ["cut.png", "empty.png", "slide.czi", "text.tif"]
    assert "empty" in reasons["empty.png"]
    assert "truncated" in reasons["cut.png"]
    assert "no PNG, JPEG, TIFF or BMP" in reasons["text.tif"]
    assert "convert it" in reasons["slide.czi"]
    assert seen == [(i, 6) for i in range(1, 7)]


def test_labels_that_do_not_fit_are_named_and_their_images_kept_without_label(folder):
    labels = folder / "labels"
    write_label_image(np.ones((48, 32), np.int32), labels / "a.png")
    (labels / "b.png").write_bytes((labels / "b.png").read_bytes()[:60])
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(labels / "c.png")
    write_label_image(np.ones((8, 8), np.int32), labels / "lost.png")
    (labels / "notes.txt").write_text("")
    opened = open_folder(folder)
    assert [ref.label_path for ref in opened.images] == [None, None, None]
    reasons = _reasons(opened)
    assert sorted(reasons) == ["a.png", "b.png", "c.png", "lost.png"]
    assert "48 x 32" in reasons["a.png"]
    assert "32 x 48" in reasons["a.png"]
    assert "truncated" in reasons["b.png"].lower()
    assert "one plane" in reasons["c.png"]
    assert "no image of that name" in reasons["lost.png"]


def test_labels_as_tiff(folder):
    values = np.zeros((32, 48), np.uint16)
    values[2:9, 3:9] = 7
    (folder / "labels" / "a.png").unlink()
    Image.fromarray(values).save(folder / "labels" / "a.tif")
    ref = open_folder(folder).images[0]
    np.testing.assert_array_equal(to_dense(read_labels(ref))[0], values == 7)


def test_the_manifest_names_what_is_not_there_or_outside(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("elsewhere") / "secret.png"
    write_label_image(np.ones((32, 48), np.int32), outside)
    _manifest(
        folder,
        [
            ["images/a.png", str(outside), "", "", "", ""],
            ["images/b.png", "../elsewhere.png", "", "", "", ""],
            ["images/c.png", "labels/gone.png", "", "", "", ""],
            ["images/gone.png", "", "", "", "g", "pool"],
        ],
    )
    opened = open_folder(folder)
    named = [problem.path.name for problem in opened.problems]
    assert sorted(named) == ["elsewhere.png", "gone.png", "gone.png", "secret.png"]
    assert [ref.label_path and ref.label_path.name for ref in opened.images] == ["a.png", "b.png", "c.png"]


def test_a_label_of_a_broken_image_is_not_called_lost(folder):
    (folder / "images" / "a.png").write_bytes(b"")
    assert [(p.path.parent.name, p.path.name) for p in open_folder(folder).problems] == [("images", "a.png")]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([["a.png", "", "", "", "", ""], ["images/a.png", "", "", "", "", ""]], "twice"),
        ([["a.png", "", ""]], "line 2"),
        ([["a.png", "", "", "", "", "", "more"]], "line 2"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(folder, rows, text):
    _manifest(folder, rows)
    with pytest.raises(InputError, match=text):
        open_folder(folder)


def test_a_manifest_that_cannot_be_read_is_refused(folder):
    _manifest(folder, [["a.png"]], columns=["file"])
    with pytest.raises(InputError, match=r"columns \['file'\]; expected image"):
        open_folder(folder)
    (folder / "manifest.csv").write_bytes(b"image,group\na.png,\xff\n")
    with pytest.raises(InputError, match="UTF-8"):
        open_folder(folder)
    (folder / "manifest.csv").write_text("")
    with pytest.raises(InputError, match="at least image"):
        open_folder(folder)


def test_a_manifest_from_a_spreadsheet_with_byte_order_mark(folder):
    (folder / "manifest.csv").write_bytes(b"\xef\xbb\xbfimage,group\r\na.png,s1\r\n")
    assert open_folder(folder).images[0].group == "s1"


def test_what_is_no_folder_of_images(folder, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_folder(folder / "none")
    with pytest.raises(InputError, match="is a file"):
        open_folder(folder / "images" / "a.png")
    (tmp_path / "plates" / "plate1").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no usable image .* plate1, are not entered"):
        open_folder(tmp_path / "plates")
    (tmp_path / "plates" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"no usable image .*a\.png is empty"):
        open_folder(tmp_path / "plates")


@pytest.mark.parametrize("where", ["images", "labels"])
def test_the_same_stem_twice_names_both_files(folder, where):
    Image.fromarray(np.zeros((32, 48), np.uint8)).save(folder / where / "a.tif")
    with pytest.raises(InputError, match=r"a\.png and .*a\.tif"):
        open_folder(folder)


def test_read_labels_refuses_what_does_not_fit(folder):
    ref = open_folder(folder, labels=False).images[0]
    with pytest.raises(LabelError, match=r"no label image; put labels/a\.png"):
        read_labels(ref)
    ref = open_folder(folder).images[0]
    write_label_image(np.ones((5, 6), np.int32), folder / "labels" / "a.png")
    with pytest.raises(LabelError, match=r"5 x 6 px.* 32 x 48"):
        read_labels(ref)
    (folder / "labels" / "a.png").unlink()
    with pytest.raises(ImageError, match="cannot be read"):
        read_labels(ref)


def test_a_group_in_two_splits_is_named_and_its_images_stay(folder):
    _manifest(
        folder,
        [["a.png", "", "", "", "slide", "pool"], ["b.png", "", "", "", "slide", "test"], ["c.png", "", "", "", "", ""]],
    )
    found = open_folder(folder, labels=False)
    assert [problem.reason for problem in found.problems if "slide" in problem.reason]
    assert leaking_groups(found.images) == {"slide": {"pool", "test"}}
    assert {ref.image_id for ref in found.images} >= {"a", "b"}


def test_no_split_pool_and_train_are_one_and_leak_into_the_others_alike():
    def ref(name, group, split):
        return ImageRef(name, Path(f"{name}.png"), "", 4, 4, 1, group=group, split=split)

    teaching = [ref("a", "g1", ""), ref("b", "g1", "pool"), ref("c", "g1", "train")]
    assert leaking_groups(teaching) == {}
    assert leaking_groups([*teaching, ref("d", "g1", "val")]) == {"g1": {"pool", "val"}}
