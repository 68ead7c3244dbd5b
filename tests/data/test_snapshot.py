import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from loop.data.snapshot import load_snapshot, write_snapshot
from loop.data.store import describe, write_png
from loop.data.synthetic import draw_cells
from loop.errors import ImageError, InputError, NonFiniteError, ShapeError, StateError
from loop.masks import from_masks, to_dense
from loop.types import ImageRef, Instances, Origin, Sample

IDS = {"a": [7, 3], "b": [5]}


def _samples(directory, n=3):
    samples = []
    for i, stem in enumerate("abcdef"[:n]):
        pixels, cells = draw_cells(np.random.default_rng(i), (32, 40), i, image_id=stem)
        write_png(pixels, directory / f"{stem}.png")
        split = "holdout" if stem == "b" else "train"
        samples.append(Sample(describe(directory / f"{stem}.png", group=f"g{i}", split=split, modality="m"), cells))
    return samples


def _same(left, right):
    assert left.image == right.image
    assert (left.known is None) == (right.known is None)
    if left.known is not None:
        np.testing.assert_array_equal(left.known, right.known)
    assert left.instances.origins == right.instances.origins
    np.testing.assert_array_equal(to_dense(left.instances), to_dense(right.instances))
    for name in ("scores", "labels", "weights"):
        np.testing.assert_array_equal(getattr(left.instances, name), getattr(right.instances, name))
    for name in ("image_id", "source", "model_version", "shape"):
        assert getattr(left.instances, name) == getattr(right.instances, name)


def test_what_was_frozen_comes_back(tmp_path):
    samples = _samples(tmp_path / "images")
    cells = samples[2].instances
    pseudo = Instances.build(
        cells.shape,
        cells.boxes_xyxy,
        cells.masks,
        scores=[0.1, 0.7],
        labels=[1, 0],
        weights=[0.3, 1 / 3],
        image_id="c",
        source="pseudo",
        model_version="celloop-p-v3",
    )
    samples[2] = Sample(replace(samples[2].image, extra={"k": "v"}, label_path=tmp_path / "l.png"), pseudo)
    written = write_snapshot(tmp_path / "snapshots", samples, IDS, "p")
    loaded = load_snapshot(tmp_path / "snapshots", written.id)
    for snapshot in (written, loaded):
        assert snapshot.annotation_ids == {"a": [3, 7], "b": [5], "c": []}
        assert snapshot.project == "p"
        assert [s.image.image_id for s in snapshot.split("train")] == ["a", "c"]
        assert [s.image.image_id for s in snapshot.split("holdout")] == ["b"]
        for left, right in zip(snapshot.samples, samples, strict=True):
            _same(left, right)
        snapshot.verify()
    assert loaded.id == written.id
    assert len(loaded.id) == 16


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_overlapping_and_holed_masks_survive(tmp_path_factory, seed, n):
    rng = np.random.default_rng(seed)
    cells = from_masks([rng.random((7, 9)) < 0.5 for _ in range(n)], (7, 9), scores=rng.random(n), image_id="x")
    image = ImageRef("x", Path("/nowhere/x.png"), "0" * 64, 7, 9, 1, split="train")
    root = tmp_path_factory.mktemp("snapshots")
    written = write_snapshot(root, [Sample(image, cells)], {}, "p")
    _same(load_snapshot(root, written.id).samples[0], Sample(image, cells))


def test_the_order_of_samples_and_ids_does_not_matter_and_nothing_is_written_twice(tmp_path):
    samples = _samples(tmp_path / "images")
    first = write_snapshot(tmp_path / "s", samples, IDS, "p")
    stamp = (tmp_path / "s" / first.id / "snapshot.json").stat().st_mtime_ns
    second = write_snapshot(tmp_path / "s", samples[::-1], {"b": (5,), "a": [3, 7], "c": []}, "p")
    assert second.id == first.id
    assert [s.image.image_id for s in second.samples] == ["a", "b", "c"]
    assert (tmp_path / "s" / first.id / "snapshot.json").stat().st_mtime_ns == stamp
    assert [p.name for p in (tmp_path / "s").iterdir()] == [first.id]


def test_the_id_is_the_hash_that_the_standard_library_gives(tmp_path):
    mask = np.eye(4, 5, dtype=bool)
    cells = from_masks([mask], (4, 5), scores=[0.5], image_id="x")
    image = ImageRef("x", Path("x.png"), "ab" * 32, 4, 5, 1, group="g", split="train", extra={"k": "v"})
    fields = {
        "image_id": "x",
        "sha256": "ab" * 32,
        "height": 4,
        "width": 5,
        "channels": 1,
        "group": "g",
        "split": "train",
        "modality": "",
        "low": 0.0,
        "high": 255.0,
    }
    counts = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    columns = {"counts": [counts], "scores": [0.5], "labels": [0], "weights": [1.0]}
    record = {"image": fields, "annotations": [1], "cells": {**columns, "source": "human", "model_version": ""}}
    canonical = json.dumps([1, "p", [record]], sort_keys=True, separators=(",", ":")).encode()
    expected = hashlib.sha256(canonical).hexdigest()[:16]
    assert write_snapshot(tmp_path, [Sample(image, cells)], {"x": [1]}, "p").id == expected


def test_where_the_files_lie_does_not_matter_but_is_noted(tmp_path):
    samples = _samples(tmp_path / "old")
    first = write_snapshot(tmp_path / "s", samples, IDS, "p")
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(ImageError, match="cannot be read"):
        load_snapshot(tmp_path / "s", first.id).verify()
    moved = [Sample(replace(s.image, path=tmp_path / "new" / s.image.path.name), s.instances) for s in samples]
    assert write_snapshot(tmp_path / "s", moved, IDS, "p").id == first.id
    loaded = load_snapshot(tmp_path / "s", first.id)
    loaded.verify()
    assert loaded.samples[0].image.path == tmp_path / "new" / "a.png"
    assert [p.name for p in (tmp_path / "s").iterdir()] == [first.id]


def test_relative_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (sample,) = _samples(Path("images"), 1)
    snapshot = write_snapshot(Path("s"), [sample], {}, "p")
    assert load_snapshot(tmp_path / "s", snapshot.id).samples[0].image.path == tmp_path / "images" / "a.png"


def _changed(samples, i, cells=None, **image):
    new = list(samples)
    new[i] = Sample(replace(samples[i].image, **image), samples[i].instances if cells is None else cells)
    return new


def test_any_change_of_content_gives_another_id(tmp_path):
    samples = _samples(tmp_path / "images")
    cells = samples[2].instances
    mask = cells.masks[0].copy()
    mask[tuple(np.argwhere(mask)[0])] = False

    def built(**change):
        fields = {"masks": cells.masks, "scores": None, "labels": None, "weights": None, "image_id": "c"} | change
        return Instances.build(cells.shape, cells.boxes_xyxy, **fields)

    variants = [
        (samples, IDS, "p"),
        (samples, IDS, "q"),
        (samples[:2], IDS, "p"),
        (samples, IDS | {"c": [1]}, "p"),
        (samples, IDS | {"b": [6]}, "p"),
        (_changed(samples, 0, split="holdout"), IDS, "p"),
        (_changed(samples, 0, group="other"), IDS, "p"),
        (_changed(samples, 0, modality="other"), IDS, "p"),
        (_changed(samples, 0, sha256="0" * 64), IDS, "p"),
        (_changed(samples, 2, built(masks=(mask, cells.masks[1]))), IDS, "p"),
        (_changed(samples, 2, built(weights=[1, 0.5])), IDS, "p"),
        (_changed(samples, 2, built(scores=[1, 0.5])), IDS, "p"),
        (_changed(samples, 2, built(labels=[0, 1])), IDS, "p"),
        (_changed(samples, 2, built(source="pseudo")), IDS, "p"),
        (_changed(samples, 2, built(model_version="v1")), IDS, "p"),
        (_changed(samples, 2, cells.take([1, 0])), IDS, "p"),
    ]
    ids = {write_snapshot(tmp_path / "s", *variant).id for variant in variants}
    assert len(ids) == len(variants)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == sorted(ids)


def test_one_changed_pixel_of_an_image_is_seen(tmp_path):
    samples = _samples(tmp_path / "images")
    snapshot = write_snapshot(tmp_path / "s", samples, IDS, "p")
    pixels, _ = draw_cells(np.random.default_rng(1), (32, 40), 1)
    pixels[0, 0] ^= 1
    write_png(pixels, tmp_path / "images" / "b.png")
    with pytest.raises(ImageError, match=r"b\.png has changed since snapshot"):
        load_snapshot(tmp_path / "s", snapshot.id).verify()
    again = [Sample(describe(s.image.path, group=s.image.group, split=s.image.split), s.instances) for s in samples]
    assert write_snapshot(tmp_path / "s", again, IDS, "p").id != snapshot.id


def test_cells_without_a_pixel_are_dropped(tmp_path):
    cells = Instances.build(
        (4, 5), [(0, 0, 2, 2), (1, 1, 3, 3)], [np.zeros((2, 2)), np.ones((2, 2))], scores=[0.2, 0.9]
    )
    image = ImageRef("x", Path("/x.png"), "0" * 64, 4, 5, 1, split="train")
    snapshot = write_snapshot(tmp_path, [Sample(image, cells)], {}, "p")
    for got in (snapshot, load_snapshot(tmp_path, snapshot.id)):
        assert got.samples[0].instances.scores.tolist() == [pytest.approx(0.9)]


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_a_kill_leaves_no_half_snapshot_and_the_next_try_succeeds(tmp_path, monkeypatch, moment):
    samples, root = _samples(tmp_path / "images"), tmp_path / "s"

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", die) if moment == "fsync" else patched.setattr(Path, "rename", die)
        patched.setattr("shutil.rmtree", lambda *_, **__: None)  # a killed process tidies nothing up
        with pytest.raises(Killed):
            write_snapshot(root, samples, IDS, "p")
    leftovers = [p.name for p in root.iterdir()]
    assert all(name.startswith(".") for name in leftovers)
    snapshot = write_snapshot(root, samples, IDS, "p")
    assert load_snapshot(root, snapshot.id).id == snapshot.id


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match="No space left on device"):
        write_snapshot(tmp_path / "s", _samples(tmp_path / "images"), IDS, "p")
    assert list((tmp_path / "s").iterdir()) == []


def test_a_missing_or_damaged_snapshot_is_refused(tmp_path):
    snapshot = write_snapshot(tmp_path / "s", _samples(tmp_path / "images"), IDS, "p")
    for wrong in ("0" * 16, "../" + snapshot.id, "", snapshot.id.upper() + "x"):
        with pytest.raises(StateError, match="no snapshot"):
            load_snapshot(tmp_path / "s", wrong)
    file = tmp_path / "s" / snapshot.id / "snapshot.json"
    whole = file.read_bytes()
    document = orjson.loads(whole)
    document["samples"][2]["cells"]["weights"] = [0.5, 0.5]
    for damage in (whole[: len(whole) // 2], b"[]", b"{}", orjson.dumps(document)):
        file.write_bytes(damage)
        with pytest.raises(StateError, match="damaged"):
            load_snapshot(tmp_path / "s", snapshot.id)


def test_refusals(tmp_path):
    samples = _samples(tmp_path / "images")
    small = Instances.build((4, 4))
    cells = samples[2].instances
    nan = Instances.build(cells.shape, cells.boxes_xyxy, cells.masks, weights=[1, np.nan], image_id="c")
    for given_samples, ids, error, text in (
        ([*samples, samples[0]], IDS, InputError, "image a is given twice"),
        (_changed(samples, 0, split="pool"), IDS, InputError, "split 'pool'"),
        (_changed(samples, 0, group="g1"), IDS, InputError, "group 'g1' is in the hold-out and beside it"),
        (_changed(samples, 0, small), IDS, ShapeError, r"\(4, 4\).*\(32, 40\)"),
        (_changed(samples, 2, nan), IDS, NonFiniteError, "'c'"),
        (samples, {"z": [1]}, InputError, "'z'"),
    ):
        with pytest.raises(error, match=text):
            write_snapshot(tmp_path / "s", given_samples, ids, "p")
    assert not (tmp_path / "s").exists()


def _hand_made(nuclei=None):
    first, second = np.zeros((2, 6, 8), bool)
    first[1:4, 2:6] = True
    second[3:6, 5:8] = True
    a = ImageRef("a", Path("/a.png"), "0" * 64, 6, 8, 3, group="g", split="train", modality="m", extra={"k": "v"})
    b = ImageRef("b", Path("/b.png"), "1" * 64, 6, 8, 1, split="holdout")
    cells = from_masks([first, second], (6, 8), scores=[1, 0.5], labels=[0, 1], weights=[1, 0.25], image_id="a")
    return [Sample(a, cells, nuclei), Sample(b, Instances.build((6, 8), image_id="b"))]


def test_snapshots_without_nuclei_keep_the_ids_they_had_before_there_were_any(tmp_path):
    assert write_snapshot(tmp_path, _hand_made(), {"a": [7, 3]}, "p").id == "4d0702eeaec4a64a"
    assert load_snapshot(tmp_path, "4d0702eeaec4a64a").samples[0].nuclei is None


def test_nuclei_come_back_and_count_for_the_id(tmp_path):
    one = np.zeros((6, 8), bool)
    one[2:4, 3:5] = True
    drawn = from_masks([one, np.roll(one, 1)], (6, 8), image_id="a", labels=[1, 1], weights=[1, 0.5])
    unseen = Instances.build((6, 8), [(0, 0, 1, 1)], [np.zeros((1, 1))], image_id="a")
    variants = {"some": drawn, "fewer": drawn.take([0]), "none here": unseen, "not labelled": None}
    ids = {}
    for name, nuclei in variants.items():
        ids[name] = write_snapshot(tmp_path, _hand_made(nuclei), {}, "p").id
        sample = load_snapshot(tmp_path, ids[name]).samples[0]
        kept = Instances.build((6, 8), image_id="a") if name == "none here" else nuclei
        assert (sample.nuclei is None) == (kept is None)
        if kept is not None:
            _same(Sample(sample.image, sample.nuclei), Sample(sample.image, kept))
        _same(Sample(*sample[:2]), Sample(*_hand_made()[0][:2]))
    assert len(set(ids.values())) == 4
    file = tmp_path / ids["some"] / "snapshot.json"
    document = orjson.loads(file.read_bytes())
    document["samples"][0]["nuclei"]["weights"] = [1.0, 1.0]
    file.write_bytes(orjson.dumps(document))
    with pytest.raises(StateError, match="damaged"):
        load_snapshot(tmp_path, ids["some"])


def test_nuclei_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ShapeError, match=r"the nuclei of a lie in \(4, 4\), the image is \(6, 8\)"):
        write_snapshot(tmp_path, _hand_made(Instances.build((4, 4))), {}, "p")
    mask = [np.ones((1, 1), bool)]
    with pytest.raises(NonFiniteError, match="the nuclei of image 'a'"):
        write_snapshot(tmp_path, _hand_made(Instances.build((6, 8), [(0, 0, 1, 1)], mask, scores=[np.nan])), {}, "p")


ORIGINS = st.builds(
    Origin, st.sampled_from(["human", "human-accepted", "human-edited", "model", "pseudo"]), st.text(max_size=5)
)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(ORIGINS, max_size=4),
    st.booleans(),
    st.sampled_from([None, 0.0, 0.3, 0.9, 1.0]),
    st.sampled_from(["train", "pseudo", "holdout"]),
)
def test_origins_weights_and_known_areas_come_back(tmp_path_factory, seed, origins, listed, share, split):
    """Also empty masks between the cells, areas without a pixel, and names in any alphabet."""
    rng = np.random.default_rng(seed)
    stack = [rng.random((5, 7)) < rng.choice([0, 0.5]) for _ in origins]
    cells = Instances.build(
        (5, 7),
        [(0, 0, 7, 5)] * len(stack),
        stack,
        scores=rng.random(len(stack)),
        weights=rng.random(len(stack)),
        image_id="x",
        source="pseudo",
        origins=origins if listed else (),
    )
    known = None if share is None else rng.random((5, 7)) < share
    image = ImageRef("x", Path("/x.png"), "0" * 64, 5, 7, 1, split=split)
    root = tmp_path_factory.mktemp("snapshots")
    written = write_snapshot(root, [Sample(image, cells, None, known)], {}, "p")
    loaded = load_snapshot(root, written.id)
    (sample,) = loaded.split(split)
    _same(sample, written.samples[0])
    kept = [i for i, mask in enumerate(stack) if mask.any()]
    assert [sample.instances.origin(i) for i in range(len(kept))] == [cells.origin(i) for i in kept]
    np.testing.assert_array_equal(sample.instances.weights, cells.weights[kept])
    whole = np.ones((5, 7), bool)
    np.testing.assert_array_equal(whole if sample.known is None else sample.known, whole if known is None else known)


def test_what_says_nothing_new_changes_no_id(tmp_path):
    first, second = _hand_made()
    plain = replace(first.instances, origins=(Origin("human"),) * 2)
    same = [Sample(first.image, plain, None, np.ones((6, 8), bool)), second]
    assert write_snapshot(tmp_path, same, {"a": [7, 3]}, "p").id == "4d0702eeaec4a64a"
    drawn = replace(first.instances, origins=(Origin("human"), Origin("human-edited", "v1-r2")))
    known = np.zeros((6, 8), bool)
    ids = {
        write_snapshot(tmp_path, [sample, second], {"a": [7, 3]}, "p").id
        for sample in (first, Sample(first.image, drawn), Sample(first.image, first.instances, None, known))
    }
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("splits", "fits"),
    [
        (("train", "pseudo"), True),
        (("pseudo", "train", "pseudo"), True),
        (("holdout", "pseudo"), False),
        (("pseudo", "holdout"), False),
        (("train", "holdout"), False),
    ],
)
def test_a_group_may_teach_in_two_ways_but_never_measure_beside_it(tmp_path, splits, fits):
    none = Instances.build((4, 4))
    samples = [
        Sample(ImageRef(f"i{n}", Path(f"/i{n}.png"), "0" * 64, 4, 4, 1, group="slide", split=split), none)
        for n, split in enumerate(splits)
    ]
    if fits:
        assert [s.image.split for s in write_snapshot(tmp_path, samples, {}, "p").samples] == list(splits)
    else:
        with pytest.raises(InputError, match="group 'slide' is in the hold-out and beside it"):
            write_snapshot(tmp_path, samples, {}, "p")


def test_a_known_area_of_another_size_is_refused(tmp_path):
    first, second = _hand_made()
    with pytest.raises(ShapeError, match=r"`known` of a is \(4, 4\), the image is \(6, 8\)"):
        write_snapshot(tmp_path, [first._replace(known=np.ones((4, 4), bool)), second], {}, "p")
