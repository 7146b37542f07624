"""What OpenVINO computes in bf16, within its bounds of fp32; which bundles it runs; the VAE in slices.

The bounds are those of bf16's eight bits: 5e-2 of a network's result, and 45 dB between restorations.
"""

import numpy as np
import pytest
from golden import assert_golden, relative_l2

from engine import Restorer
from engine.image.files import read_photo
from engine.memory.vae_slices import SlicedVae

pytest.importorskip("openvino", reason="needs the openvino extra")

#: Measured: up to 3.3e-2 for the deepest control, 2.0e-2 for the UNet, 1.8e-2 for the VAE in slices.
BOUND = 5e-2
STEPS = {"steps": 4, "min_size": 128}


@pytest.fixture(scope="module")
def wide(bundle_fp32):
    with Restorer.open(bundle_fp32, backend="openvino", compute="fp32") as opened:
        yield opened


@pytest.fixture(scope="module")
def narrow(bundle_fp32, bf16_units):
    with Restorer.open(bundle_fp32, backend="openvino", compute="bf16") as opened:
        yield opened


@pytest.fixture(scope="module")
def bundle_bf16(build_bundle, once):
    return once("bf16", lambda folder: build_bundle(folder, precision="bf16"))


@pytest.fixture(scope="module")
def photo(photo_path):
    return read_photo(photo_path).rgb[64:192, 128:256]


def assert_near(actual, expected):
    """Assert that `actual` is `expected` as bf16 has it, and that zeros or shuffled values are not."""
    assert relative_l2(actual, expected) <= BOUND
    shuffled = np.random.default_rng(0).permutation(actual.reshape(-1)).reshape(actual.shape)
    assert all(relative_l2(wrong, expected) > 15 * BOUND for wrong in (np.zeros_like(actual), shuffled))


def psnr(first, second):
    return -10 * np.log10(np.mean((first - second) ** 2))


def run(restorer, graph, inputs):
    return restorer.stages._run(graph, inputs, graph, None)


def test_networks_in_bf16_are_near_the_reference_and_not_in_fp32(narrow, reference):
    inputs = {name: reference[f"net/{name}"] for name in ("x", "timestep", "context", "vector")}
    controls = run(narrow, "controlnet", {"lq": reference["net/lq_latent"], **inputs})
    for name, control in controls.items():
        assert_near(control, reference[f"net/{name}"])
    scale = np.ones(1, np.float32)
    given = {f"control_{index}": reference[f"net/control_{index}"] for index in range(10)}
    eps = run(narrow, "unet", {**inputs, **given, "control_scale": scale})["eps"]
    assert_near(eps, reference["net/eps_control_scale_1.0"])
    pixels = run(narrow, "vae_decoder", {"z": reference["vae/z_lq"]})["pixels"]
    assert_near(pixels, reference["vae/stage1"])
    for found, name in ((eps, "net/eps_control_scale_1.0"), (pixels, "vae/stage1")):
        assert np.abs(found - reference[name]).max() > 1e-4, "it was computed in fp32"


@pytest.mark.parametrize("graph", ["denoise_encoder", "vae_encoder"])
def test_the_encoders_last_layers_are_computed_in_fp32(demo_bundle, bf16_units, photo, graph):
    """Measured: 6e-3; with those in bf16 too, 3.4e-2 and 4.8e-2."""
    pixels = {"pixels": 2 * photo.transpose(2, 0, 1)[None] - 1}
    found = []
    for compute in ("fp32", "bf16"):
        with Restorer.open(demo_bundle, backend="openvino", compute=compute) as restorer:
            found.append(run(restorer, graph, pixels)["z"])
    assert_golden(found[1], found[0], 9e-3)
    assert relative_l2(found[1], found[0]) > 1e-4, "it was computed in fp32"


def test_an_encoder_in_slices_in_bf16_is_as_near_as_the_whole(demo_bundle, bf16_units, photo):
    pixels = 2 * photo.transpose(2, 0, 1)[None] - 1
    with Restorer.open(demo_bundle, backend="openvino", compute="fp32") as restorer:
        clean = restorer.stages.encode_clean(pixels)
    with Restorer.open(demo_bundle, backend="openvino", compute="bf16") as restorer:
        assert_golden(restorer.stages.encode_clean(pixels, vae_mode=SlicedVae(min_slices=4)), clean, 9e-3)


def test_bf16_restores_what_fp32_restores(wide, narrow, photo):
    first, second = (restorer.restore(photo, **STEPS).photo.rgb for restorer in (wide, narrow))
    assert psnr(first, second) > 45
    assert not np.array_equal(first, second)


def test_bf16_gives_the_same_again_together_and_alone_and_with_other_threads(narrow, bundle_fp32, photo):
    photos = [photo, photo[::-1].copy()]
    together = [result.photo.rgb for result in narrow.restore_batch(photos, seeds=[1, 2], **STEPS)]
    with Restorer.open(bundle_fp32, backend="openvino", compute="bf16", threads=1) as other:
        for seed, each, found in zip((1, 2), photos, together, strict=True):
            assert np.array_equal(found, narrow.restore(each, seed=seed, **STEPS).photo.rgb)
            assert np.array_equal(found, other.restore(each, seed=seed, **STEPS).photo.rgb)


def test_the_vae_in_slices_in_bf16_is_within_its_bound(wide, narrow):
    z = np.random.default_rng(2).normal(size=(1, wide.bundle.latent_channels, 16, 24)).astype(np.float32)
    whole = wide.stages.decode(z)
    assert_golden(wide.stages.decode(z, vae_mode=SlicedVae(min_slices=4)), whole, 2e-5)
    assert_near(narrow.stages.decode(z, vae_mode=SlicedVae(min_slices=4)), whole)
    pixels = whole.clip(-1, 1)
    clean = wide.stages.encode_clean(pixels)
    assert_near(narrow.stages.encode_clean(pixels, vae_mode=SlicedVae(min_slices=4)), clean)


def test_the_vae_of_a_bf16_bundle_works_in_slices(bundle_bf16):
    with Restorer.open(bundle_bf16, backend="openvino") as restorer:
        z = np.random.default_rng(2).normal(size=(1, restorer.bundle.latent_channels, 8, 8)).astype(np.float32)
        whole = restorer.stages.decode(z)
        assert_near(restorer.stages.decode(z, vae_mode=SlicedVae(min_slices=2)), whole)


@pytest.mark.parametrize("compute", ["auto", "fp32"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_bundles_of_sixteen_bits_are_run(request, wide, photo, precision, compute):
    """Those in bf16 too, which ONNX Runtime does not run on a CPU."""
    bundle = request.getfixturevalue(f"bundle_{precision}")
    with Restorer.open(bundle, backend="openvino", compute=compute) as restorer:
        result = restorer.restore(photo, **STEPS)
    # Weights that are rounded to bf16 are other weights, whatever computes with them.
    assert psnr(result.photo.rgb, wide.restore(photo, **STEPS).photo.rgb) > (45 if precision == "fp16" else 38)
    if compute == "fp32":
        assert result.provenance["backend"]["compute"] == "fp32"
