"""Small pictures for people to look at."""

from __future__ import annotations

import io

from engine.image.encoding import to_image
from engine.image.photo import Photo, resize

#: Longer side in pixels, as wide as a column of text on a large screen; about 100 kB.
REPORT_PX = 960


def preview(photo: Photo, side: int) -> bytes:
    """Return a photo as a small WebP in its own colours, with its transparency; nothing else of it is kept.

    Args:
        photo: of any size.
        side: in pixels, that the longer one has at most.
    """
    small = shrunk(photo, side / max(photo.size))
    buffer = io.BytesIO()
    # A profile for grey does not fit what is stored as RGB.
    profile = b"" if photo.grey else photo.icc_profile or b""
    to_image(small).save(buffer, "WEBP", quality=82, method=4, icc_profile=profile)
    return buffer.getvalue()


def small_jpeg(photo: Photo, side: int) -> bytes:
    """Return a photo as a small JPEG without transparency, for models that look at it; see `preview`."""
    buffer = io.BytesIO()
    to_image(Photo(shrunk(photo, side / max(photo.size)).rgb)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def shrunk(photo: Photo, scale: float) -> Photo:
    """Return the pixels of a photo, smaller by a factor; the same size if that is above 1."""
    scale = min(1.0, scale)
    size = (max(1, round(photo.size[0] * scale)), max(1, round(photo.size[1] * scale)))
    return Photo(resize(photo.rgb, size), None if photo.alpha is None else resize(photo.alpha, size))
