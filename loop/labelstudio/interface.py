"""What a project's label config (XML) offers: where the image is, which controls hold masks, which take prompts."""

from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from loop.errors import LabelError

MASK_KINDS = ("polygonlabels", "brushlabels", "bitmasklabels")
CELL_KINDS = (*MASK_KINDS, "rectanglelabels", "ellipselabels")
_PROMPT_KINDS = ("keypointlabels", "keypoint")
_COLOURS = ("#00c853", "#ff9100", "#d500f9", "#ffd600", "#2979ff", "#ff1744", "#00e5ff", "#8d6e63")
_ROW = "display: flex; align-items: center; gap: 0 12px;"

UNUSABLE = "unusable"


@dataclass(frozen=True)
class Control:
    """One control of a label config.

    `kind` is its tag in lower case ("polygonlabels", "choices", ...). `labels` are the names that its results carry
    (a label's alias where it has one). `smart` controls send what is drawn with them to the backend, as prompts.
    """

    name: str
    kind: str
    labels: tuple[str, ...] = ()
    smart: bool = False

    @property
    def takes_prompts(self) -> bool:
        """True where regions are hints to a model, never cells: keypoints, and boxes or ellipses of a smart control."""
        return self.kind in _PROMPT_KINDS or (self.smart and self.kind not in MASK_KINDS)


@dataclass(frozen=True)
class Interface:
    """The part of a label config that cells need.

    Attributes:
        image_name: name of the Image tag, the `to_name` of every region.
        image_value_key: the field of a task's data that holds the image's URL.
        controls: the controls of that image, in the config's order.
        labels: names of the cell classes; an instance's label i is labels[i]. First those of the control that holds
            masks, then what other drawing controls add; those of prompt controls do not count.
    """

    image_name: str
    image_value_key: str
    controls: tuple[Control, ...]
    labels: tuple[str, ...]

    @classmethod
    def parse(cls, label_config_xml: str) -> "Interface":
        """The interface that a label config describes.

        Raises:
            LabelError: the text is no XML, has no Image with a value such as "$image", no control of that image can
                hold masks, or that control has no labels.
        """
        try:
            root = ElementTree.fromstring(label_config_xml)
        except ElementTree.ParseError as error:
            raise LabelError(f"the label config is no XML ({error}); see configs/label_config.xml") from error
        images = {_attribute(tag, "name"): _attribute(tag, "value") for tag in root.iter() if _kind(tag) == "image"}
        found = "no control at all"
        for image_name, value in images.items():
            controls = tuple(
                Control(_attribute(tag, "name"), _kind(tag), _labels(tag), _attribute(tag, "smart").lower() == "true")
                for tag in root.iter()
                if image_name in _attribute(tag, "toName").split(",")
            )
            held = [label for kind in MASK_KINDS for c in controls if c.kind == kind for label in c.labels]
            if held and value.startswith("$"):
                others = [label for c in controls if c.kind in CELL_KINDS and not c.takes_prompts for label in c.labels]
                return cls(image_name, value[1:], controls, tuple(dict.fromkeys([*held, *others])))
            found = ", ".join(f"{c.kind} {c.name!r} with {len(c.labels)} labels" for c in controls) or found
        if not any(value.startswith("$") for value in images.values()):
            raise LabelError(f'the label config has no <Image name="image" value="$image"/> but {images or "none"}')
        raise LabelError(
            f"the label config cannot hold masks: its image has {found}; add a PolygonLabels control (or BrushLabels,"
            " BitmaskLabels) with at least one Label, see configs/label_config.xml"
        )

    def control(self, name: str) -> Control | None:
        """The control of that name, or None."""
        return next((c for c in self.controls if c.name == name), None)

    def mask_control(self, label: str, shapes: Literal["any", "raster"] = "any") -> Control | None:
        """The control to write a cell of class `label` with: polygon before brush before bitmask, or None.

        `shapes` "raster" asks for one that holds holes and several parts: brush or bitmask.
        """
        kinds = MASK_KINDS if shapes == "any" else MASK_KINDS[1:]
        fitting = [c for kind in kinds for c in self.controls if c.kind == kind and label in c.labels]
        return fitting[0] if fitting else None


def label_config(labels: tuple[str, ...] = ("Cell",)) -> str:
    """The label config of a new project, as configs/label_config.xml has it for one class "Cell".

    Pre-labels are polygons, which Label Studio opens more than ten times faster than brush regions. Keypoints and
    boxes are prompts for the backend. The choice "unusable" takes an image out of the loop.

    Raises:
        LabelError: no labels, an empty one, or one twice.
    """
    if not labels or len(set(labels)) != len(labels) or not all(label.strip() for label in labels):
        raise LabelError(f"labels {labels!r}; expected at least one name, none empty, none twice")

    def control(title: str, tag: str, attributes: str) -> str:
        lines = [
            f"        <Label value={quoteattr(label)} background={quoteattr(_COLOURS[i % len(_COLOURS)])}/>"
            for i, label in enumerate(labels)
        ]
        opening = f'    <View style="{_ROW}">\n      <Header value="{title}" size="6"/>\n      <{tag} {attributes}>'
        return "\n".join([opening, *lines, f"      </{tag}>", "    </View>"])

    return "\n".join(
        [
            "<View>",
            f'  <View style="{_ROW} flex-wrap: wrap;">',
            control("Outline", "PolygonLabels", 'name="cell" toName="image" strokeWidth="1" opacity="0.3"'),
            control("Brush", "BrushLabels", 'name="brush" toName="image" smart="false"'),
            control("Click", "KeyPointLabels", 'name="point" toName="image" smart="true" smartOnly="true"'),
            control("Box", "RectangleLabels", 'name="box" toName="image" smart="true" smartOnly="true"'),
            '    <Choices name="usable" toName="image" choice="multiple">',
            f'      <Choice value="{UNUSABLE}"/>',
            "    </Choices>",
            "  </View>",
            '  <Image name="image" value="$image" zoom="true" zoomControl="true" brightnessControl="true"'
            ' contrastControl="true"/>',
            "</View>",
            "",
        ]
    )


def _kind(tag: ElementTree.Element) -> str:
    return tag.tag.lower()


def _attribute(tag: ElementTree.Element, name: str) -> str:
    # Label Studio's editor reads attribute names in any case.
    return next((value for key, value in tag.attrib.items() if key.lower() == name.lower()), "")


def _labels(tag: ElementTree.Element) -> tuple[str, ...]:
    names = (_attribute(child, "alias") or _attribute(child, "value") for child in tag.iter() if child is not tag)
    return tuple(name for name in names if name)
