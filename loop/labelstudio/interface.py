"""What a project's label config (XML) offers: where the image is, which controls hold masks, which take prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from loop.errors import LabelError

MASK_KINDS = ("polygonlabels", "brushlabels", "bitmasklabels")
CELL_KINDS = (*MASK_KINDS, "rectanglelabels", "ellipselabels")
_PROMPT_KINDS = ("keypointlabels", "keypoint")
_COLOURS = ("#00c853", "#d500f9", "#2979ff", "#ff1744", "#00e5ff", "#8d6e63", "#c6ff00", "#ff80ab")
_DOUBTFUL_COLOUR = "#ffab00"
_DONE_COLOUR = "#9e9e9e"
_AREA = 'name="done" toName="image" smart="false" opacity="0.1"'  # else a second, useless smart box is offered
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
            masks, then what other drawing controls add; those of prompt controls do not count, nor do the next two.
        doubtful: the label of cells of class 0 that a model is not sure of, or "". A region that still has it when a
            person submits is a cell of class 0 like others: the person has seen it.
        done: the label of regions inside which everything is labelled, or ""; they are no cells.

    `doubtful` and `done` are read wherever they come up, in the config or not; only a label that the config has is
    ever written.
    """

    image_name: str
    image_value_key: str
    controls: tuple[Control, ...]
    labels: tuple[str, ...]
    doubtful: str = ""
    done: str = ""

    @classmethod
    def parse(cls, label_config_xml: str, *, doubtful: str = "", done: str = "") -> "Interface":
        """The interface that a label config describes.

        Args:
            label_config_xml: its text.
            doubtful: which label marks doubtful cells; "" = none. Where it is the first one it is the class.
            done: which label marks areas that are done; "" = none. Where there is no other it is a class.

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
                done = done if set(held) - {done} else ""
                names = [name for name in dict.fromkeys([*held, *others]) if name != done]
                doubtful = doubtful if doubtful not in (names[0], done) else ""
                labels = tuple(name for name in names if name != doubtful)
                return cls(image_name, value[1:], controls, labels, doubtful, done)
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


def label_config(labels: tuple[str, ...] = ("Cell",), *, doubtful: str = "", done: str = "") -> str:
    """The label config of a new project; configs/label_config.xml is that of the default settings.

    Pre-labels are polygons, which Label Studio opens more than ten times faster than brush regions. Keypoints and
    boxes are prompts for the backend, and have neither `doubtful` nor `done`. The choice "unusable" takes an image out
    of the loop.

    Args:
        labels: the cell classes, the first one for pre-labels.
        doubtful: the label of doubtful cells, after the first class; "" = none.
        done: the label of areas that are done, last, and in a control of its own for rectangles; "" = none.

    Raises:
        LabelError: no labels, an empty one, one twice, or `doubtful` or `done` is the first or they are equal.
    """
    if not labels or len(set(labels)) != len(labels) or not all(label.strip() for label in labels):
        raise LabelError(f"labels {labels!r}; expected at least one name, none empty, none twice")
    if labels[0] in (doubtful, done) or (done and doubtful == done):
        raise LabelError(
            f"cells are called {labels[0]!r}, doubtful ones {doubtful!r}, done areas {done!r}; give three names "
            "(publish.labels, publish.doubtful_label, publish.done_label), or '' for neither of the last two"
        )
    colours = dict(zip((label for label in labels if label not in (doubtful, done)), cycle(_COLOURS), strict=False))
    classes = list(colours)
    colours |= {doubtful: _DOUBTFUL_COLOUR, done: _DONE_COLOUR}
    every = [name for name in (classes[0], doubtful, *classes[1:], done) if name]

    def control(title: str, tag: str, attributes: str, names: Sequence[str]) -> str:
        lines = [f"        <Label value={quoteattr(name)} background={quoteattr(colours[name])}/>" for name in names]
        opening = f'    <View style="{_ROW}">\n      <Header value="{title}" size="6"/>\n      <{tag} {attributes}>'
        return "\n".join([opening, *lines, f"      </{tag}>", "    </View>"])

    return "\n".join(
        [
            "<View>",
            f'  <View style="{_ROW} flex-wrap: wrap;">',
            control("Outline", "PolygonLabels", 'name="cell" toName="image" strokeWidth="1" opacity="0.3"', every),
            control("Brush", "BrushLabels", 'name="brush" toName="image" smart="false"', every),
            control("Click", "KeyPointLabels", 'name="point" toName="image" smart="true" smartOnly="true"', classes),
            control("Box", "RectangleLabels", 'name="box" toName="image" smart="true" smartOnly="true"', classes),
            *([control("Area", "RectangleLabels", _AREA, [done])] if done else []),
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
