"""The page of `jaxalign explore`: its template, filled with compressed arrays and images."""

from __future__ import annotations

import base64
import html
import zlib
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np

from jaxalign.files.storage import json_value
from jaxalign.report.html import filled

# Longest side of an image, in pixels.
_IMAGE_SIZE = 384


def page(data: Mapping[str, Any], images: np.ndarray, sides: Mapping[str, Any], matches: Any) -> str:
    """The page as HTML.

    Args:
        data: what the page says: names, grid, density, errors, notes and provenance.
        images: numbers of shape (images, h, w, 3).
        sides: the `Side` of "before" and "after".
        matches: the `Matches`.
    """
    content = {
        **data,
        "images": [image_url(image) for image in images],
        "sides": {name: _side(side) for name, side in sides.items()},
        "partner": array(matches.partner.astype(np.int16)),
        "confidence": array(matches.confidence),
    }
    title = html.escape(f"Patches in {', '.join(data['networks'])}")
    return filled("explore.html", json_value(content), {"TITLE": title})


def _side(side: Any) -> dict[str, Any]:
    rows = [
        {"codes": array(part.codes.T), "step": part.step, "rest": array(part.rest), "sigma": array(part.sigma)}
        for part in side.rows
    ]
    return {"rows": rows, "colors": array(side.colors), "segments": array(side.segments)}


def array(values: np.ndarray) -> dict[str, Any]:
    """An array as JSON: its dtype, and its bytes, little-endian, compressed by zlib, in base64."""
    stored = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return {"dtype": values.dtype.name, "bytes": base64.b64encode(zlib.compress(stored.tobytes(), 9)).decode()}


def image_url(image: np.ndarray) -> str:
    """An image as a data URL, a JPEG of limited size."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('--images needs pillow: python -m pip install "jaxalign[viz]"') from error
    values = 255 * image if image.dtype.kind == "f" else image
    picture = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    picture.thumbnail((_IMAGE_SIZE, _IMAGE_SIZE))
    content = BytesIO()
    picture.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
