"""Pictures of masks over an image, for MLflow, the report page and a person's eyes."""

import cv2
import numpy as np

from loop.types import Instances, UInt8Array

PREDICTED = (255, 170, 0)
PERSON = (0, 200, 255)


def overlay(pixels: UInt8Array, predicted: Instances, person: Instances | None = None) -> UInt8Array:
    """The image in RGB with outlines: predicted cells orange, a person's cells blue.

    Args:
        pixels: (H, W, 1 or 3) uint8.
        predicted: cells of a model, of the same image size.
        person: cells of a person, drawn first so that the model's lie on top; none = not drawn.

    Returns:
        (H, W, 3) uint8; the input is left as it is.
    """
    picture = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels.copy()
    picture = np.ascontiguousarray(_stretch(picture))
    for cells, colour in ((person, PERSON), (predicted, PREDICTED)):
        if cells is None:
            continue
        for (x0, y0, _, _), mask in zip(cells.boxes_xyxy, cells.masks, strict=True):
            found, _ = cv2.findContours(
                mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE, offset=(int(x0), int(y0))
            )
            cv2.drawContours(picture, found, -1, colour, 1)
    return picture


def _stretch(picture: UInt8Array) -> UInt8Array:
    """Dim pictures are brightened so that dark fluorescence can be seen at all."""
    high = float(np.percentile(picture, 99.5))
    if high <= 0 or high >= 200:
        return picture
    return np.clip(picture.astype(np.float32) * (230.0 / high), 0, 255).astype(np.uint8)
