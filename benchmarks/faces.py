"""What face detectors find, and what they take for a face, on photos that packages ship.

python benchmarks/faces.py --photo group.jpg=6 --photo street.jpg=0 --json faces.json

Photos of scikit-image and Matplotlib are always among them; --photo adds a file and the number of its faces. Detectors
beside the engine's own take part where they are installed: OpenCV's Haar cascade (opencv-python-headless<5), dlib's HOG
(dlib-bin), scikit-image's LBP cascade. With --bundle, each photo is also damaged as in the paper's Table 1, and looked
at as the engine does, on the bundle's stage 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import describe_machine
from engine import Restorer
from engine.backends.face_detector import FaceDetector
from engine.cli.console import run_command
from engine.cli.options import command_parser, path_option
from engine.image.files import read_photo
from engine.image.photo import Pixels
from engine.image.preview import shrunk
from export.training.degrade import TABLE_1, degrade

#: Packages' photos, and how many faces they have.
_PHOTOS = {
    ("skimage", "data/astronaut.png"): 1,
    ("skimage", "data/camera.png"): 1,
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"): 1,
    **{
        ("skimage", f"data/{name}"): 0
        for name in (
            *("brick.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
            *("horse.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png"),
            *("retina.jpg", "rocket.jpg", "text.png"),
        )
    },
}
#: Longer side in pixels at which photos are looked at: most faces are then 50 to 200.
_SIDE_PX = 512
_TILTS = (30, 60, 90, 180)
#: Returns how many faces it finds in f32[H, W, 3] in [0, 1].
Counter = Callable[[Pixels], int]


def counters() -> Iterator[tuple[str, Counter]]:
    """Yield the detectors that are installed, by name."""
    detector = FaceDetector(threads=1)
    yield "CenterFace", lambda rgb: len(detector.find(rgb))
    yield from (found for make in (_haar, _hog, _lbp) if (found := make()) is not None)


def _haar() -> tuple[str, Counter] | None:
    cv2: Any = _loaded("cv2")
    if cv2 is None or not hasattr(cv2, "CascadeClassifier"):
        return None
    file = Path(cv2.data.haarcascades) / "haarcascade_frontalface_alt2.xml"
    if not file.is_file():
        return None
    cv2.setNumThreads(1)
    cascade = cv2.CascadeClassifier(str(file))
    return "OpenCV, Haar", lambda rgb: len(cascade.detectMultiScale(_u8(rgb).mean(2).astype(np.uint8), 1.1, 3))


def _hog() -> tuple[str, Counter] | None:
    dlib: Any = _loaded("dlib")
    if dlib is None:
        return None
    detector = dlib.get_frontal_face_detector()
    return "dlib, HOG", lambda rgb: len(detector(_u8(rgb), 1))


def _lbp() -> tuple[str, Counter] | None:
    skimage: Any = _loaded("skimage.feature")
    if skimage is None:
        return None
    cascade = skimage.Cascade(str(files("skimage") / "data" / "lbpcascade_frontalface_opencv.xml"))
    return "scikit-image, LBP", lambda rgb: len(
        cascade.detect_multi_scale(_u8(rgb), scale_factor=1.2, step_ratio=1, min_size=(24, 24), max_size=(400, 400))
    )


def _loaded(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _u8(rgb: Pixels) -> Any:
    return np.ascontiguousarray((rgb * 255).round().astype(np.uint8))


def _tilted(rgb: Pixels, degrees: int) -> Pixels:
    turned = Image.fromarray(_u8(rgb)).rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=(127, 127, 127))
    return np.asarray(turned, np.float32) / np.float32(255)


def views(photos: Sequence[tuple[Pixels, int]], restorer: Restorer | None) -> dict[str, list[tuple[Pixels, int]]]:
    """Return the photos as they are and changed, each with the number of its faces."""
    kinds = {"as they are": list(photos)}
    for degrees in _TILTS:
        kinds[f"tilted by {degrees}°"] = [(_tilted(rgb, degrees), faces) for rgb, faces in photos]
    kinds["lfw, 100 × 100 pixels"] = list(_lfw())
    if restorer is not None:
        rng = np.random.default_rng(0)
        for name, damage in TABLE_1.items():
            kinds[f"{name}, on stage 1"] = [
                (restorer.stage1(degrade(rgb, damage, rng)).rgb, faces) for rgb, faces in photos
            ]
    return kinds


def _lfw() -> Iterator[tuple[Pixels, int]]:
    """Yield scikit-image's 100 faces of Labeled Faces in the Wild and its 100 pieces without, on grey."""
    pictures = np.load(str(files("skimage") / "data" / "lfw_subset.npy"))
    for index, picture in enumerate(pictures):
        grey = Image.fromarray((picture * 255).astype(np.uint8)).resize((100, 100), Image.Resampling.BICUBIC)
        canvas = np.full((192, 192, 3), 0.5, np.float32)
        canvas[46:146, 46:146] = np.asarray(grey, np.float32)[:, :, None] / np.float32(255)
        yield canvas, int(index < 100)


def measure(photos: Sequence[tuple[Pixels, int]], restorer: Restorer | None) -> Iterator[dict[str, Any]]:
    """Yield, for each detector and kind of view, how many faces are found and how many are false, and the time.

    A view's findings beyond the number of its faces count as false.
    """
    kinds = views(photos, restorer)
    for name, count in counters():
        for kind, pictures in kinds.items():
            started = time.perf_counter()
            found = [count(rgb) for rgb, _ in pictures]
            took_ms = (time.perf_counter() - started) * 1e3 / len(pictures)
            expected = [faces for _, faces in pictures]
            right = sum(map(min, found, expected))
            yield {
                "detector": name,
                "view": kind,
                "faces": sum(expected),
                "found": right,
                "without": expected.count(0),
                "false": sum(found) - right,
                "ms": round(took_ms, 1),
            }


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("python benchmarks/faces.py", __doc__)
    parser.add_argument("--photo", type=_counted, action="append", default=[], metavar="FILE=N", help="with N faces")
    parser.add_argument("--bundle", type=path_option, metavar="DIR", help="for the damaged photos' stage 1")
    parser.add_argument("--json", type=path_option, metavar="FILE")
    options = parser.parse_args(arguments)
    named = [(Path(str(files(package))) / name, faces) for (package, name), faces in _PHOTOS.items()]
    photos = []
    for path, faces in (*named, *options.photo):
        photo = read_photo(path)
        photos.append((shrunk(photo, _SIDE_PX / max(photo.size)).rgb, faces))
    print("| detector | view | found | false | ms a picture |\n|---|---|---:|---:|---:|")
    rows = []
    with contextlib.ExitStack() as opened:
        named_bundle = options.bundle is not None
        restorer = opened.enter_context(Restorer.open(options.bundle, threads=1)) if named_bundle else None
        for row in measure(photos, restorer):
            cells = row["detector"], row["view"], f"{row['found']} of {row['faces']}", row["false"], f"{row['ms']:g}"
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            rows.append(row)
    if options.json is not None:
        report = {
            "machine": describe_machine(),
            "photos": [[str(path.name), faces] for path, faces in (*named, *options.photo)],
        }
        options.json.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")
    return 0


def _counted(text: str) -> tuple[Path, int]:
    name, sign, count = text.rpartition("=")
    if not sign or not name or not count.isascii() or not count.isdigit():
        raise argparse.ArgumentTypeError(f"expected FILE=N, got {text!r}")
    return Path(name), int(count)


if __name__ == "__main__":
    sys.exit(run_command(main))
