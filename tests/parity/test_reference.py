"""The bundle's graphs, through each backend that runs on CPUs, against the original implementation's outputs.

Bounds are issue 1's. Loose bounds hide mistakes: a wrong GroupNorm eps costs up to 6e-5.
"""

import numpy as np
import pytest
from golden import assert_golden, in_the_last_bit_of

from engine.bundle.manifest import open_bundle
from engine.image.files import read_photo
from engine.pipeline.text import Conditioning, join_context, join_vector
from engine.sampling.guidance import Ramp
from engine.sampling.sampler import sample
from engine.sampling.schedule import nearest_level

NET, VAE, TEXT, SAMPLE = 5e-6, 2e-5, 2e-6, 1e-5


@pytest.fixture(scope="module")
def restorer(each_restorer):
    return each_restorer


def run_of(restorer):
    return lambda graph, inputs: restorer.stages._run(graph, inputs, graph, None)


@pytest.fixture(scope="module")
def run(restorer):
    """Run a graph of the fp32 bundle on named arrays."""

    return run_of(restorer)


@pytest.fixture(scope="module")
def net_inputs(reference):
    return {
        "x": reference["net/x"],
        "timestep": reference["net/timestep"],
        "context": reference["net/context"],
        "vector": reference["net/vector"],
    }


def test_controlnet(run, reference, net_inputs):
    controls = run("controlnet", {"lq": reference["net/lq_latent"], **net_inputs})
    assert list(controls) == [f"control_{index}" for index in range(10)]
    for name, control in controls.items():
        assert_golden(control, reference[f"net/{name}"], NET)


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_unet(run, reference, net_inputs, scale):
    controls = {f"control_{index}": reference[f"net/control_{index}"] for index in range(10)}
    eps = run("unet", {**net_inputs, **controls, "control_scale": np.array([scale], np.float32)})["eps"]
    assert_golden(eps, reference[f"net/eps_control_scale_{scale}"], NET)


def test_vae(run, reference):
    z_lq = run("denoise_encoder", {"pixels": reference["vae/lq"]})["z"]
    assert_golden(z_lq, reference["vae/z_lq"], VAE)
    stage1 = run("vae_decoder", {"z": reference["vae/z_lq"]})["pixels"]
    assert_golden(stage1, reference["vae/stage1"], VAE)
    center = run("vae_encoder", {"pixels": reference["vae/stage1"]})["z"]
    assert_golden(center, reference["vae/z_stage1_mode"], VAE)


def test_text(run, restorer, reference):
    hidden = run("text_encoder", {"input_ids": reference["text/ids_clip_l"]})["hidden"]
    second = run("text_encoder_2", {"input_ids": reference["text/ids_big_g"]})
    assert_golden(hidden, reference["text/hidden_clip_l"], TEXT)
    assert_golden(second["hidden"], reference["text/hidden_big_g"], TEXT)
    assert_golden(second["pooled"], reference["text/pooled"], TEXT)
    frequencies = in_the_last_bit_of(restorer.bundle.manifest.frequencies, reference["text/vector"][0])
    for index in range(2):
        row = slice(index, index + 1)
        assert_golden(join_context(hidden[row], second["hidden"][row]), reference["text/context"][index], TEXT)
        assert_golden(join_vector(second["pooled"][index], frequencies), reference["text/vector"][index], TEXT)


@pytest.fixture(scope="module")
def texts(reference):
    return [
        Conditioning(reference[f"sample/context_{sign}"][0], reference[f"sample/vector_{sign}"][0])
        for sign in ("pos", "neg")
    ]


CASES = [
    "edm_4_cfg2",
    "edm_15_cfg2",
    "edm_8_linear_cfg",
    "edm_8_restore4",
    "edm_8_linear_control",
    "edm_8_churn5",
    "edm_8_everything",
    "dpmpp2m_8_eta1",
]


def case_settings(case):
    control = case["control_scale"]
    pull = case.get("restore_cfg", -1)
    return {
        "steps": case["steps"],
        "sampler": {"RestoreEDMSampler": "edm", "RestoreDPMPP2MSampler": "dpmpp2m"}[case["sampler"]],
        "cfg_scale": (case["cfg"]["scale"], case["cfg"]["scale_min"]),
        "control_scale": (case["control_scale_start"] if case["linear_control"] else control, control),
        "restore_pull": pull if pull > 0 else None,
        "churn": case.get("s_churn", 0.0),
        "s_noise": case.get("s_noise", 1.0),
        "eta": case.get("eta", 1.0),
    }


def test_every_case_is_covered(cases):
    assert sorted(CASES) == sorted(cases)


@pytest.mark.parametrize("name", CASES)
def test_whole_runs(restorer, reference, cases, texts, name):
    settings = restorer.defaults.updated(case_settings(cases[name]))
    if settings.sampler == "edm":
        step_noise = reference["sample/churn_eps"]
    else:  # step i uses the reference's noise i - 1; the first and the last step use none
        step_noise = np.concatenate([np.full((1, 1, 4, 16, 24), np.nan), reference["sample/dpmpp2m_eps"]])
        step_noise = step_noise.astype(np.float32)
    z = restorer.stages.sample(
        reference["sample/z_lq"],
        texts,
        settings,
        noise=reference["sample/noise"],
        step_noise=step_noise,
        center=reference["sample/z_stage1"],
    )
    assert_golden(z, reference[f"sample/{name}"], SAMPLE)


@pytest.mark.parametrize("sign", ["pos", "neg"])
def test_denoiser(restorer, reference, texts, sign):
    """D(x; sigma = 2.5) of one text, as one step of the loop sees it."""
    from engine.pipeline.denoiser import CFGDenoiser
    from engine.sampling.sampler import edm_table

    def quantize(sigma):
        level = nearest_level(sigma)
        return level.timestep, level.sigma

    sigma = float(reference["denoise/sigma"][0])
    spec = restorer.bundle.spec("unet")
    network = CFGDenoiser(run_of(restorer), spec, reference["sample/z_lq"], [texts[sign == "neg"]])
    # One step to sigma = 0 returns D itself.
    table = edm_table(
        [sigma, 0.0],
        quantize=quantize,
        cfg_scale=lambda sigma: 1.0,
        control_scale=Ramp(1.0, 1.0),
        pull=lambda sigma, sigma_next: 0.0,
    )
    x = reference["denoise/x"] / np.float32(table.start_scale)
    *_, last = sample(table, network, lambda draw: x)
    assert_golden(last.x, reference[f"denoise/out_{sign}"], NET)


# -- half precision -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(bundle_fp16):
    from engine import Restorer

    with Restorer.open(bundle_fp16, backend="onnxruntime") as opened:
        yield opened


def test_fp16_networks_are_near_fp32(half, run, reference, net_inputs):
    """Issue 1: fp16 graphs within 1e-2 of fp32, run through ONNX Runtime."""
    narrow = {
        name: value.astype(np.float16) if name in ("context", "vector") else value for name, value in net_inputs.items()
    }
    lq = reference["net/lq_latent"]
    narrow_run = run_of(half)
    wide_controls = run("controlnet", {"lq": lq, **net_inputs})
    controls = narrow_run("controlnet", {"lq": lq, **narrow})
    for name, control in controls.items():
        assert control.dtype == np.float16
        assert_golden(control, wide_controls[name], 1e-2 / 2)
    scale = np.ones(1, np.float32)
    eps = narrow_run("unet", {**narrow, **controls, "control_scale": scale})["eps"]
    assert eps.dtype == np.float32
    assert_golden(eps, run("unet", {**net_inputs, **wide_controls, "control_scale": scale})["eps"], 1e-2 / 2)
    ids = reference["text/ids_big_g"]
    for name, value in narrow_run("text_encoder_2", {"input_ids": ids}).items():
        assert_golden(value, run("text_encoder_2", {"input_ids": ids})[name], 1e-2 / 2)


def test_fp16_bundle_keeps_the_vae_in_float32(bundle_fp16):
    bundle = open_bundle(bundle_fp16)
    precisions = {name: graph.spec.precision for name, graph in bundle.manifest.graphs.items()}
    assert [name for name, precision in precisions.items() if precision == "fp32"] == [
        "denoise_encoder",
        "vae_encoder",
        "vae_decoder",
    ]


def test_fp16_restores_what_fp32_restores(half, restorer, photo_path):
    photo = read_photo(photo_path).rgb[64:192, 128:256]
    wide, narrow = (opened.restore(photo, min_size=128, steps=4).photo.rgb for opened in (restorer, half))
    psnr = -10 * np.log10(np.mean((wide - narrow) ** 2))
    assert psnr > 45
