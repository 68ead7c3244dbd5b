import re
from pathlib import Path

import pytest
from label_studio_sdk.label_interface import LabelInterface

from loop.config import PublishConfig
from loop.errors import LabelError
from loop.labelstudio.interface import Interface, label_config

ROOT = Path(__file__).resolve().parents[2]


def view(*tags, image='<Image name="img" value="$url"/>'):
    return f"<View>{image}{''.join(tags)}</View>"


def control(tag, name, *labels, to="img", extra=""):
    inner = "".join(f'<Label value="{label}"/>' for label in labels)
    return f'<{tag} name="{name}" toName="{to}" {extra}>{inner}</{tag}>'


def test_the_committed_config_is_the_default_one():
    shown = PublishConfig()
    xml = label_config(shown.labels, doubtful=shown.doubtful_label, done=shown.done_label)
    assert (ROOT / "configs" / "label_config.xml").read_text(encoding="utf-8") == xml


@pytest.mark.parametrize("special", [{}, {"doubtful": "Cell?", "done": 'the "done" <area>'}])
@pytest.mark.parametrize("labels", [("Cell",), ("Cell", 'odd & "quoted" <one>')])
def test_the_default_config_is_accepted_by_label_studios_own_parser(labels, special):
    parsed = LabelInterface(label_config(labels, **special))
    parsed.validate()
    wanted = [labels[0], *([special["doubtful"]] if special else []), *labels[1:]]
    assert parsed.get_control("cell").labels == wanted + ([special["done"]] if special else [])
    assert [tag.name for tag in parsed.objects] == ["image"]


def test_the_default_config_read_back():
    interface = Interface.parse(label_config(("Cell", "Debris")))
    assert (interface.image_name, interface.image_value_key) == ("image", "image")
    assert interface.labels == ("Cell", "Debris")
    assert [(c.name, c.kind, c.smart, c.takes_prompts) for c in interface.controls] == [
        ("cell", "polygonlabels", False, False),
        ("brush", "brushlabels", False, False),
        ("point", "keypointlabels", True, True),
        ("box", "rectanglelabels", True, True),
        ("usable", "choices", False, False),
    ]
    assert interface.mask_control("Debris").name == "cell"
    assert interface.mask_control("Debris", "raster").name == "brush"
    assert interface.mask_control("Dust") is None
    assert interface.control("nothing") is None


def test_doubtful_cells_and_done_areas_have_labels_but_are_no_classes():
    xml = label_config(("Cell", "Debris"), doubtful="Cell?", done="Done area")
    interface = Interface.parse(xml, doubtful="Cell?", done="Done area")
    assert interface.labels == ("Cell", "Debris")
    assert (interface.doubtful, interface.done) == ("Cell?", "Done area")
    drawn = ("Cell", "Cell?", "Debris", "Done area")
    assert {c.name: c.labels for c in interface.controls} == {
        "cell": drawn,
        "brush": drawn,
        "point": ("Cell", "Debris"),
        "box": ("Cell", "Debris"),
        "done": ("Done area",),
        "usable": ("unusable",),
    }
    assert not interface.control("done").takes_prompts
    assert interface.mask_control("Cell?", "raster").name == "brush"
    # Whoever does not know these names, as the backend does, still finds the cells' label first.
    assert Interface.parse(xml).labels == ("Cell", "Cell?", "Debris", "Done area")
    colours = re.findall(r'background="(#\w+)"', xml)[:4]
    assert colours[1] == "#ffab00"
    assert len(set(colours)) == 4


@pytest.mark.parametrize(
    ("labels", "expected", "doubtful", "done"),
    [
        (("Done area", "Cell"), ("Cell",), "Cell?", "Done area"),
        (("Cell?", "Cell"), ("Cell?", "Cell"), "", "Done area"),
        (("Done area",), ("Done area",), "Cell?", ""),
        (("Done area", "Cell?"), ("Cell?",), "", "Done area"),
        (("Nucleus", "Debris"), ("Nucleus", "Debris"), "Cell?", "Done area"),
    ],
)
def test_the_first_label_is_always_that_of_cells(labels, expected, doubtful, done):
    interface = Interface.parse(view(control("PolygonLabels", "p", *labels)), doubtful="Cell?", done="Done area")
    assert (interface.labels, interface.doubtful, interface.done) == (expected, doubtful, done)


@pytest.mark.parametrize(
    ("labels", "special"),
    [(("Cell",), {"doubtful": "Cell"}), (("Cell",), {"done": "Cell"}), (("Cell",), {"doubtful": "x", "done": "x"})],
)
def test_special_labels_must_differ_from_the_cells_and_each_other(labels, special):
    with pytest.raises(LabelError, match="give three names"):
        label_config(labels, **special)


def test_special_labels_that_are_named_among_the_classes_are_there_once():
    xml = label_config(("Cell", "Done area", "Cell?"), doubtful="Cell?", done="Done area")
    assert xml == label_config(("Cell",), doubtful="Cell?", done="Done area")


@pytest.mark.parametrize("labels", [(), ("",), ("Cell", " "), ("Cell", "Cell")])
def test_labels_must_be_named_and_differ(labels):
    with pytest.raises(LabelError, match="at least one name"):
        label_config(labels)


def test_a_persons_own_config():
    xml = view(
        control("RectangleLabels", "r", "Box", "Cell"),
        control("KeyPointLabels", "k", "Background"),
        control("EllipseLabels", "e", "Round"),
        control("BrushLabels", "b", "Nucleus", "Cell", extra='smart="TRUE"'),
        control("BitmaskLabels", "m", "Cell"),
        '<TextArea name="note" toName="img"/>',
        control("Labels", "elsewhere", "Word", to="text"),
    )
    interface = Interface.parse(xml)
    assert (interface.image_name, interface.image_value_key) == ("img", "url")
    assert interface.labels == ("Nucleus", "Cell", "Box", "Round")
    assert not interface.control("b").takes_prompts
    assert interface.mask_control("Cell").name == "b"
    assert interface.control("elsewhere") is None


def test_aliases_and_case_are_read_as_the_editor_reads_them():
    xml = (
        '<View><IMAGE Name="i" value="$i"/>'
        '<polygonlabels name="p" toname="i"><label value="Long" alias="c"/></polygonlabels></View>'
    )
    interface = Interface.parse(xml)
    assert interface.labels == ("c",)
    assert interface.controls[0].kind == "polygonlabels"


def test_the_image_with_a_mask_control_is_taken():
    two = '<Image name="overview" value="$o"/><Image name="img" value="$url"/>'
    interface = Interface.parse(
        view(control("Choices", "c", to="overview"), control("PolygonLabels", "p", "A"), image=two)
    )
    assert interface.image_name == "img"
    assert [c.name for c in interface.controls] == ["p"]


@pytest.mark.parametrize(
    ("xml", "says"),
    [
        ("no xml", "is no XML"),
        ("", "is no XML"),
        (
            view(control("RectangleLabels", "r", "A")),
            "cannot hold masks: its image has rectanglelabels 'r' with 1 labels",
        ),
        (view(control("PolygonLabels", "p")), "cannot hold masks: its image has polygonlabels 'p' with 0 labels"),
        (view(control("PolygonLabels", "p", "A", to="other")), "its image has no control at all"),
        (view(control("PolygonLabels", "p", "A"), image=""), "has no <Image"),
        (view(control("PolygonLabels", "p", "A"), image='<Image name="img" valueList="$urls"/>'), "has no <Image"),
    ],
)
def test_a_config_that_cannot_hold_masks_is_refused(xml, says):
    with pytest.raises(LabelError, match=says):
        Interface.parse(xml)
