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
    scale = min(1.0, side / max(photo.size))
    size = (max(1, round(photo.size[0] * scale)), max(1, round(photo.size[1] * scale)))
    alpha = None if photo.alpha is None else resize(photo.alpha, size)
    small = Photo(resize(photo.rgb, size), alpha)
    buffer = io.BytesIO()
    # A profile for grey does not fit what is stored as RGB.
    profile = b"" if photo.grey else photo.icc_profile or b""
    to_image(small).save(buffer, "WEBP", quality=82, method=4, icc_profile=profile)
    return buffer.getvalue()
