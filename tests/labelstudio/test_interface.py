from pathlib import Path

import pytest
from label_studio_sdk.label_interface import LabelInterface

from loop.errors import LabelError
from loop.labelstudio.interface import Interface, label_config

ROOT = Path(__file__).resolve().parents[2]


def view(*tags, image='<Image name="img" value="$url"/>'):
    return f"<View>{image}{''.join(tags)}</View>"


def control(tag, name, *labels, to="img", extra=""):
    inner = "".join(f'<Label value="{label}"/>' for label in labels)
    return f'<{tag} name="{name}" toName="{to}" {extra}>{inner}</{tag}>'


def test_the_committed_config_is_the_default_one():
    assert (ROOT / "configs" / "label_config.xml").read_text(encoding="utf-8") == label_config()


@pytest.mark.parametrize("labels", [("Cell",), ("Cell", 'odd & "quoted" <one>')])
def test_the_default_config_is_accepted_by_label_studios_own_parser(labels):
    parsed = LabelInterface(label_config(labels))
    parsed.validate()
    assert parsed.get_control("cell").labels == list(labels)
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
