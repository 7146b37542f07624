"""`benchmarks/quality.py`: tables, pictures and mistakes, on the demo bundle at a size that takes seconds."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

pytest.importorskip("skimage", reason="needs the quality extra")

from benchmarks import images, quality
from benchmarks.images import contact_sheet, load_images
from benchmarks.paper import TABLE_1 as PUBLISHED
from engine.errors import ImageError, UsageError
from export.training.degrade import TABLE_1


def run(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), "--quiet", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def test_tables_figures_and_pictures(bundle_fp32, tmp_path):
    options = ["--bundle", bundle_fp32, "--side", 64, "--limit", 2, "--images", "leaves", "--classics"]
    done = run(*options, "--json", tmp_path / "q.json", "--sheet", tmp_path / "q.png")
    assert done.returncode == 0, done.stderr
    assert "| ×4 | lightning |" in done.stdout
    assert "28.57 | 0.5357 | 0.2250 |" in done.stdout  # the paper's, beside ours
    assert "needs --lpips" in done.stdout
    report = json.loads((tmp_path / "q.json").read_text())
    assert len(report["rows"]) == len(TABLE_1) * 3  # bicubic, stage 1, the bundle
    assert "HaarPSI ↑" in done.stdout
    for row in report["rows"]:
        for metric in ("psnr", "ssim", "haarpsi", "gmsd", "mdsi", "edges", "detail_fine"):
            assert row[metric] == pytest.approx(np.mean([scores[metric] for scores in row["per_image"]]))
        assert len(row["per_image"]) == 2
    sheet = Image.open(tmp_path / "q.png")
    assert sheet.width > 4 * 64
    assert sheet.height > 6 * 64
    again = run(*options, "--json", tmp_path / "again.json")
    assert again.returncode == 0
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == report["rows"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("steps=3", ("steps", 3)),
        ("restore_pull=0.1", ("restore_pull", 0.1)),
        ("restore_pull=off", ("restore_pull", None)),
        ("control_scale=0.9:1", ("control_scale", (0.9, 1.0))),
        ("sampler=dpmpp2m", ("sampler", "dpmpp2m")),
    ],
)
def test_a_setting_of_ones_own(given, expected):
    assert quality._parser().parse_args(["--set", given]).set == [expected]


@pytest.mark.parametrize("wrong", ["upscale=2", "stepz=3", "steps", "steps=many", "cfg_scale=1:2:3"])
def test_a_setting_that_is_none_is_told(wrong, capsys):
    with pytest.raises(SystemExit):
        quality._parser().parse_args(["--set", wrong])
    assert "argument --set: " in capsys.readouterr().err


def test_a_method_that_is_asked_for_and_missing_is_told(monkeypatch):
    monkeypatch.setattr(quality, "installed_classics", lambda: ({}, {"BM3D": "pip install bm3d"}))
    with pytest.raises(UsageError, match=r"BM3D: the package of a method is not installed\n.*pip install bm3d"):
        quality.main(["--images", "leaves", "--side", "64", "--limit", "1", "--classics", "BM3D"])


def test_the_paper_has_a_figure_for_every_degradation():
    assert set(PUBLISHED) == set(TABLE_1)


def test_photos_are_eight_and_of_the_size_asked_for():
    photos = load_images("photos", 256)
    assert len(photos) == 8
    for photo in photos.values():
        assert photo.shape == (256, 256, 3)
        assert photo.dtype == np.float32
        assert 0 <= photo.min() < photo.max() <= 1


def test_other_photos_are_twelve_choices_six_and_none_is_in_two_sets():
    sets = {name: load_images(name, 256) for name in ("photos", "others", "choices")}
    assert [len(photos) for photos in sets.values()] == [8, 12, 6]
    every = [photo for photos in sets.values() for photo in photos.values()]
    for photo in every:
        assert photo.shape == (256, 256, 3)
        assert photo.dtype == np.float32
        assert photo.std() > 0.02
    assert len({photo.tobytes() for photo in every}) == 26


def test_photos_of_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(images._OTHERS, "grace hopper", ("no_such_package", "a.jpg"))
    with pytest.raises(UsageError, match="no_such_package: a package whose photos are wanted is not installed"):
        load_images("others", 256)
    monkeypatch.setitem(images._OTHERS, "grace hopper", ("skimage", "data/no_such.png"))
    with pytest.raises(ImageError, match="is not in the installed version of its package"):
        load_images("others", 256)


def test_a_folder_of_the_users(tmp_path):
    Image.fromarray(np.arange(80 * 100 * 3, dtype=np.uint8).reshape(80, 100, 3)).save(tmp_path / "a.png")
    (found,) = load_images(str(tmp_path), 64).values()
    assert found.shape == (64, 64, 3)
    with pytest.raises(ImageError, match=r"a\.png: is too small"):
        load_images(str(tmp_path), 90)
    with pytest.raises(UsageError, match="no such images"):
        load_images(str(tmp_path / "nothing"), 64)


def test_a_sheet_shows_each_picture_in_its_place():
    shades = [[np.full((16, 16, 3), (row + column) / 4, np.float32) for column in range(2)] for row in range(3)]
    sheet = np.asarray(contact_sheet(shades, ["a", "b", "c"], ["left", "right"]))
    for row in range(3):
        for column in range(2):
            shade = round((row + column) / 4 * 255)
            top, left = 22 + row * (16 + 22 + 6) + 22, 6 + column * (16 + 6)
            assert (sheet[top : top + 16, left : left + 16] == shade).all()


@pytest.mark.parametrize("content", [b"no network", b""])
def test_a_damaged_lpips_network_is_told(bundle_fp32, tmp_path, content):
    (tmp_path / "lpips.onnx").write_bytes(content)
    done = run("--bundle", bundle_fp32, "--images", "leaves", "--limit", 1, "--lpips", tmp_path / "lpips.onnx")
    assert done.returncode == 1
    assert "cannot open the LPIPS network" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_lpips_network_gives_its_column(bundle_fp32, tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    from onnx import TensorProto, helper

    shape = [1, 3, "H", "W"]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("a", "b")]
    nodes = [
        helper.make_node("Sub", ["a", "b"], ["d"]),
        helper.make_node("Abs", ["d"], ["e"]),
        helper.make_node("ReduceMean", ["e"], ["f"], keepdims=0),
    ]
    output = helper.make_tensor_value_info("f", TensorProto.FLOAT, [])
    graph = helper.make_graph(nodes, "distance", values, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "l.onnx")
    options = ["--bundle", bundle_fp32, "--side", 64, "--images", "leaves", "--limit", 1, "--set", "steps=2"]
    done = run(*options, "--lpips", tmp_path / "l.onnx", "--json", tmp_path / "q.json")
    assert done.returncode == 0, done.stderr
    assert "needs --lpips" not in done.stdout
    assert json.loads((tmp_path / "q.json").read_text())["bundles"][0]["settings"]["steps"] == 2
    assert all(0 < row["lpips"] < 2 for row in json.loads((tmp_path / "q.json").read_text())["rows"])
