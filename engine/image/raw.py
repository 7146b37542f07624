"""Camera raws: developed by LibRaw, where it is installed. Their thumbnails are never taken for the photo."""

from __future__ import annotations

import io

import numpy as np

from engine.errors import ImageError, first_line
from engine.image.photo import Photo


def develop(data: bytes, where: object, max_pixels: int | None) -> Photo:
    """Develop a camera raw: the camera's white balance, sRGB, 16 bits a channel, upright.

    Args:
        data: of the file.
        where: what errors call it.
        max_pixels: that it may have.
    Raises:
        ImageError: it is damaged, of a camera that is not known, too large, or the library is missing.
    """
    try:
        import rawpy
    except ModuleNotFoundError as error:
        raise ImageError(
            "is a camera raw, which needs a library to be developed",
            where=where,
            found=f"no module {error.name}",
            fix="pip install rawpy, or 'restoration-engine[raw]'; or develop it first, to a 16-bit TIFF",
        ) from error
    try:
        with rawpy.imread(io.BytesIO(data)) as file:
            if max_pixels is not None and file.sizes.width * file.sizes.height > max_pixels:
                found = f"{file.sizes.width} × {file.sizes.height}"
                expected = f"up to {max_pixels / 1e6:.0f} million pixels"
                raise ImageError("is too large", where=where, expected=expected, found=found)
            pixels = file.postprocess(use_camera_wb=True, output_bps=16)
    except rawpy.LibRawError as error:
        fix = "develop it first, to a 16-bit TIFF"
        found = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else first_line(error)
        raise ImageError("is a camera raw that cannot be developed", where=where, found=found, fix=fix) from error
    rgb = pixels.astype(np.float32) / np.float32(65535.0)
    left = ("a camera raw, developed with its white balance and no other settings",)
    return Photo(rgb, bits=16, warnings=left)
