"""ICC profiles of colours that a file states by numbers: a PNG's gAMA and cHRM, or code points (ITU-T H.273)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: x, y of white, red, green and blue by H.273's code of the primaries.
_PRIMARIES = {
    1: (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06),  # BT.709, sRGB
    5: (0.3127, 0.3290, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),  # BT.601, 625 lines
    6: (0.3127, 0.3290, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),  # BT.601, 525 lines
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),  # BT.2020
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # Display P3
}
#: Curves by H.273's code of the transfer function: an exponent, or the five numbers of ICC's third kind of curve.
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_BT709_CURVE = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
_CURVES: dict[int, tuple[float, ...]] = {
    1: _BT709_CURVE,
    4: (2.2,),
    5: (2.8,),
    6: _BT709_CURVE,
    8: (1.0,),
    13: _SRGB_CURVE,
    14: _BT709_CURVE,
    15: _BT709_CURVE,
}
_NAMES = {9: "BT.2020", 12: "Display P3", 16: "PQ", 18: "HLG", 8: "linear"}
_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def is_srgb(cicp: bytes) -> bool:
    """Tell whether code points mean what is taken for granted without any: sRGB, or video's near twin."""
    return cicp[0] in (1, 2, 5, 6) and cicp[1] in (1, 2, 6, 13)


def code_point_names(cicp: bytes) -> str:
    """Return code points as people know them, such as "BT.2020, PQ"."""
    return ", ".join(_NAMES.get(code, str(code)) for code in cicp[:2])


def profile_of_code_points(cicp: bytes, *, grey: bool = False) -> bytes | None:
    """Return the profile of code points, of grey or of RGB; None where curves do not say it, as for PQ."""
    primaries, curve = _PRIMARIES.get(cicp[0]), _CURVES.get(cicp[1])
    return None if primaries is None or curve is None else _profile(primaries, curve, code_point_names(cicp), grey=grey)


def profile_of_gamma(gamma: float | None, chroma: Sequence[float] | None, *, grey: bool = False) -> bytes | None:
    """Return the profile of a PNG's gAMA and cHRM, of grey or of RGB, None if they are sRGB's or make no sense."""
    if gamma is None and chroma is None:
        return None
    xy = tuple(chroma) if chroma is not None else _PRIMARIES[1]
    usual = gamma is None or abs(gamma - 0.45455) < 0.001
    if usual and np.allclose(xy, _PRIMARIES[1], atol=0.001):
        return None
    if gamma is not None and not 0.1 < gamma < 10:
        return None
    curve = _SRGB_CURVE if usual else (1 / gamma,) if gamma is not None else _SRGB_CURVE
    try:
        return _profile(xy, curve, "gAMA and cHRM", grey=grey)
    except (np.linalg.LinAlgError, ZeroDivisionError, struct.error, ValueError, OverflowError):
        return None


def _profile(xy: Sequence[float], curve: tuple[float, ...], name: str, *, grey: bool) -> bytes:
    """Return a display profile of three primaries and one curve, or of grey and a curve.

    Source: ICC.1:2022, matrix/TRC; adaptation to D50 by Bradford.
    """
    white, *primaries = (_xyz(x, y) for x, y in zip(xy[::2], xy[1::2], strict=True))
    matrix = np.stack(primaries, axis=1)
    matrix = matrix * np.linalg.solve(matrix, white)
    cone = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    adapt = np.linalg.inv(_BRADFORD) @ np.diag(cone) @ _BRADFORD
    columns = (adapt @ matrix).T
    if not np.isfinite(columns).all() or np.abs(columns).max() > 4:
        raise ValueError("no colours that exist")
    kind = {1: 0, 5: 3}[len(curve)]
    trc = b"para\0\0\0\0" + struct.pack(">HH", kind, 0) + b"".join(map(_fixed, curve))
    tags = [
        (b"desc", _text(name)),
        (b"cprt", _text("no copyright")),
        (b"wtpt", _xyz_tag(_D50)),
        (b"chad", b"sf32\0\0\0\0" + b"".join(map(_fixed, adapt.ravel()))),
    ]
    if grey:
        tags.append((b"kTRC", trc))
    else:
        tags += zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(_xyz_tag, columns), strict=True)
        tags += [(code, trc) for code in (b"rTRC", b"gTRC", b"bTRC")]
    table, body = struct.pack(">I", len(tags)), b""
    places: dict[bytes, int] = {}
    start = 128 + 4 + 12 * len(tags)
    for code, value in tags:
        if value not in places:
            places[value] = start + len(body)
            body += value + bytes(-len(value) % 4)
        table += code + struct.pack(">II", places[value], len(value))
    size = start + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x04300000, b"mntr", b"GRAY" if grey else b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(24) + bytes(4)
    head += b"".join(map(_fixed, _D50))
    return head.ljust(128, b"\0") + table + body


def _xyz(x: float, y: float) -> NDArray[np.float64]:
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz_tag(xyz: NDArray[np.float64]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, xyz))


def _text(text: str) -> bytes:
    encoded = text.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(encoded), 28) + encoded
