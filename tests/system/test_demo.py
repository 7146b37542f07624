"""The weights that ship: what they are, and what they reach on photos that they were not trained on."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("skimage", reason="needs the quality extra")

from safetensors import safe_open
from skimage.metrics import peak_signal_noise_ratio

from benchmarks import quality
from engine import Restorer
from export.build_engines import main as build_main
from export.demo import files

MEGABYTE = 1_000_000


def psnr(truth, found):
    return peak_signal_noise_ratio(truth, found, data_range=1.0)


def measure(folder, images, bundle, *options):
    """Run the benchmark; returns its report, with its rows by degradation and method."""
    file = folder / "quality.json"
    assert quality.main(["--quiet", "--bundle", str(bundle), "--images", images, "--json", str(file), *options]) == 0
    report = json.loads(file.read_text())
    return {**report, "rows": {(row["degradation"], row["method"]): row for row in report["rows"]}}


def test_the_files_are_small_and_in_half_precision():
    found = [path for path in files.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in found) <= 24 * MEGABYTE
    for path in (files.SDXL, files.SUPIR, *files.LORAS.values()):
        with safe_open(path, "np") as opened:
            assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"F16"}  # noqa: SIM118


@pytest.fixture(scope="module", params=["1", pytest.param("8", marks=pytest.mark.slow)])
def report(request, demo_bundle, tmp_path_factory):
    """Of the first photo, or of all."""
    return measure(tmp_path_factory.mktemp("quality"), "photos", demo_bundle, "--limit", request.param)


@pytest.fixture
def table(report):
    return report["rows"]


@pytest.mark.timeout(600)
def test_it_restores_noisy_photos_better_than_non_local_means(table):
    ours, classic = (table["blur σ=3, noise σ=30", method] for method in ("ours", "non-local means"))
    assert ours["psnr"] > classic["psnr"]
    assert ours["ssim"] > classic["ssim"]


def test_it_restores_small_photos_better_than_bicubic_interpolation(table):
    ours, bicubic = (table["blur σ=2, ×4, noise σ=1", method] for method in ("ours", "bicubic"))
    assert ours["psnr"] > bicubic["psnr"] + 0.3
    assert ours["ssim"] > bicubic["ssim"]
    ours, bicubic = (table["×4", method] for method in ("ours", "bicubic"))
    assert ours["psnr"] > bicubic["psnr"] - 0.5


def test_the_autoencoder_gives_photos_back(report):
    assert report["round_trip"]["psnr"] > 29.0


def test_the_same_seed_gives_the_same_photo_in_either_precision(demo_bundle, photo_path, tmp_path):
    with Restorer.open(demo_bundle) as restorer:
        first, second = (restorer.restore(photo_path, seed=3, steps=5).photo.rgb for _ in range(2))
    assert np.array_equal(first, second)
    half = tmp_path / "fp16"
    assert build_main(["--precision", "fp16", "--output", str(half), "--quiet"]) == 0
    with Restorer.open(half, backend="onnxruntime") as restorer:
        found = restorer.restore(photo_path, seed=3, steps=5).photo.rgb
    assert psnr(first, found) > 45.0


@pytest.fixture(scope="module")
def variants(demo_bundle, tmp_path_factory):
    """Bundles without LoRAs, with each alone, and with both."""
    place = tmp_path_factory.mktemp("variants")
    requests = {
        "lightning": ["--preset", "lightning"],
        **{name: ["--preset", "lightning-lora", "--lora", f"{name}={path}"] for name, path in files.LORAS.items()},
    }
    for name, arguments in requests.items():
        assert build_main([*arguments, "--output", str(place / name), "--quiet"]) == 0
    return {**{name: place / name for name in requests}, "ours": demo_bundle}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("images", "lora"), [("landscape", "landscape"), ("portrait", "face")])
def test_each_lora_helps_its_own_family_also_beside_the_other(variants, images, lora, tmp_path):
    scores = {}
    for name in ("lightning", lora, "ours"):
        rows = measure(tmp_path, images, variants[name])["rows"]
        own = [row["psnr"] for (_, method), row in rows.items() if method not in ("bicubic", "classic", "stage 1")]
        scores[name] = np.mean(own)
    assert scores[lora] > scores["lightning"] + 0.3
    assert scores["ours"] > scores[lora] - 0.1


def test_one_bundle_in_two_runtimes_is_compared_with_itself(bundle_fp32, tmp_path, capsys):
    pytest.importorskip("openvino", reason="needs the openvino extra")
    found = measure(
        tmp_path, "photos", bundle_fp32, "--limit", "1", "--side", "64", "--runtime", "onnxruntime", "openvino-fp32"
    )
    compared = [
        row["psnr_to_first"] for (_, method), row in found["rows"].items() if method == "lightning, openvino-fp32"
    ]
    assert len(compared) == 3
    assert all(least > 60 for (least,) in compared)
    assert "### Against lightning, onnxruntime" in capsys.readouterr().out
