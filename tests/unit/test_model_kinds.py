"""Files by their content, 8-bit weights, and models that look like SDXL and would give noise."""

import json

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

import layouts
import ml_dtypes
import numpy as np
from safetensors.torch import save_file

from engine.errors import CheckpointError
from export.checkpoint.checkpoint import open_sdxl, open_unet
from export.checkpoint.tensor_files import metadata_of, open_file

UNET = "model.diffusion_model."
PROJECTION = "conditioner.embedders.1.model.text_projection"


@pytest.fixture(scope="module")
def sdxl(tiny):
    return {name: torch.from_numpy(value) for name, value in layouts.load(tiny.sdxl).items()}


def saved(path, tensors, metadata=None):
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    return path


# -- content, not names ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.bin", "model.sft", "model", "model.pt.tmp"])
@pytest.mark.parametrize("writer", ["safetensors", "torch", "legacy"])
def test_files_are_told_by_their_content(tmp_path, name, writer):
    tensors = {"x.weight": torch.arange(6.0).reshape(2, 3), "x.half": torch.ones(2, dtype=torch.bfloat16)}
    if writer == "safetensors":
        saved(tmp_path / name, tensors, {"note": "1"})
    else:
        torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=writer == "torch")
    found = open_file(tmp_path / name)
    assert {key: tensor.read().astype(np.float32).tolist() for key, tensor in found.items()} == {
        key: tensor.float().tolist() for key, tensor in tensors.items()
    }
    assert metadata_of(tmp_path / name) == ({"note": "1"} if writer == "safetensors" else {})


def test_a_base_of_any_name_is_read(tiny, tmp_path):
    file = tmp_path / "sdxl.ckpt"
    file.write_bytes(tiny.sdxl.read_bytes())
    assert set(open_sdxl(file).tensors) == set(open_sdxl(tiny.sdxl).tensors)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF\3\0\0\0" + bytes(40), "(?s)GGUF file, which holds quantized weights.*fp16 or fp8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "(?s)pointer of Git LFS.*git lfs pull"),
        (b"\n <!doctype html><html>404", "(?s)web page.*download it again"),
        (b"hello", "not a checkpoint"),
        (b"", "not a checkpoint"),
    ],
)
@pytest.mark.parametrize("name", ["model.ckpt", "model"])
def test_what_is_no_checkpoint_is_told(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_file(tmp_path / name)
    for part in (name, "expected: ", "found: ", "to do: "):
        assert part in str(caught.value)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_folders_of_pickles(tiny, tmp_path, shards, variant):
    """As diffusers and transformers wrote them before safetensors."""
    folder = layouts.write_diffusers_folder(tiny.sdxl, tmp_path / "m", shards=shards, variant=variant[1:])
    for file in [*folder.rglob("*.safetensors")]:
        tensors = {name: torch.from_numpy(value) for name, value in layouts.load(file).items()}
        torch.save(tensors, file.with_name(named(file.name)))
        file.unlink()
    for index in [*folder.rglob("*.json")]:
        index.with_name(named(index.name)).write_text(named(index.read_text()))
        index.unlink()
    found, expected = open_sdxl(folder), open_sdxl(tiny.sdxl)
    assert set(found.tensors) == set(expected.tensors)
    name = "unet.conv_in.weight"
    assert np.array_equal(found.tensors[name].read(), expected.tensors[name].read())


def named(text):
    text = text.replace(".safetensors", ".bin").replace('"model', '"pytorch_model')
    return f"pytorch_{text}" if text.startswith("model") else text


# -- a Linear layer's projection -----------------------------------------------------------------------


def test_big_gs_projection_as_a_linear_layer(tiny, sdxl, tmp_path):
    """kijai/ComfyUI-SUPIR#81: converters store the transpose, as a Linear layer's weight."""
    linear = dict(sdxl)
    linear[f"{PROJECTION}.weight"] = linear.pop(PROJECTION).T
    found = open_sdxl(saved(tmp_path / "linear.safetensors", linear)).tensors
    expected = open_sdxl(tiny.sdxl).tensors
    assert set(found) == set(expected)
    for name in expected:
        assert np.array_equal(found[name].read(), expected[name].read()), name
    both = saved(tmp_path / "both.safetensors", {**sdxl, f"{PROJECTION}.weight": sdxl[PROJECTION].clone()})
    with pytest.raises(CheckpointError, match="two tensors claim one place"):
        open_sdxl(both)


def test_what_sdxl_does_not_use_of_clip_is_left_out(tiny, sdxl, tmp_path):
    extra = {
        "conditioner.embedders.0.transformer.text_projection.weight": torch.eye(64),
        "conditioner.embedders.1.model.attn_mask": torch.zeros(77, 77),
    }
    found = open_sdxl(saved(tmp_path / "sdxl.safetensors", sdxl | extra))
    assert set(found.tensors) == set(open_sdxl(tiny.sdxl).tensors)


# -- 8-bit floats --------------------------------------------------------------------------------------

FP8 = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}


def every_value(kind):
    return torch.arange(256, dtype=torch.uint8).view(getattr(torch, kind)).reshape(16, 16)


@pytest.mark.parametrize("file", ["fp8.safetensors", "fp8.ckpt"])
@pytest.mark.parametrize("kind", FP8)
def test_every_8_bit_value_is_widened_exactly(tmp_path, kind, file):
    tensors = {"x.weight": every_value(kind)}
    if file.endswith(".safetensors"):
        saved(tmp_path / file, tensors)
    else:
        torch.save(tensors, tmp_path / file)
    found = open_file(tmp_path / file)["x.weight"]
    assert found.shape == (16, 16)
    assert found.read().dtype == np.float32
    np.testing.assert_array_equal(found.read(), every_value(kind).float().numpy())  # NaN equals NaN here


@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.tensor([0.3]), torch.rand(16) + 0.1, torch.rand(16, 1)])
@pytest.mark.parametrize(
    "names", [("scale_weight", "scale_input", "scaled_fp8"), ("weight_scale", "input_scale", None)]
)
@pytest.mark.parametrize("kind", FP8)
def test_scaled_weights_are_exact(tmp_path, kind, names, scale):
    """The product of an 8-bit value and a float32 scale needs more than float32."""
    values = torch.nan_to_num(every_value(kind).float(), 0, 0, 0).to(getattr(torch, kind))
    tensors = {"a.b.weight": values, f"a.b.{names[0]}": scale, f"a.b.{names[1]}": torch.tensor(2.0)}
    if names[2]:
        tensors["a.scaled_fp8"] = torch.zeros(2).to(getattr(torch, kind))
    else:
        mark = json.dumps({"format": kind}).encode()
        tensors["a.b.comfy_quant"] = torch.frombuffer(bytearray(mark), dtype=torch.uint8)
    found = open_file(saved(tmp_path / "fp8.safetensors", tensors))
    assert list(found) == ["a.b.weight"]
    expected = values.double() * (scale.double().reshape(-1, 1) if scale.numel() > 1 else scale.double())
    np.testing.assert_array_equal(found["a.b.weight"].read(), expected.numpy())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.scale_weight": torch.ones(1)}, "(?s)a.scale_weight: a scale without a weight"),
        ({"a.weight": torch.ones(4, 4), "a.weight_scale": torch.ones(2, 2)}, "(?s)does not fit its weight.*2, 2"),
        ({"a.weight": torch.ones(4, 4), "a.weight_scale": torch.ones(3)}, "(?s)a scale does not fit its weight"),
        (
            {"a.weight": torch.ones(4, 4), "a.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}')).byte()},
            "(?s)quantized in a way that is not supported.*nvfp4",
        ),
        ({"a.comfy_quant": torch.tensor(list(b"{")).byte()}, "cannot tell how a weight is quantized"),
        ({"a.weight": torch.ones(4, 4).char(), "a.weight_scale": torch.ones(1)}, "(?s)plain floating-point.*int8"),
    ],
)
def test_other_quantizations_are_told(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        open_file(saved(tmp_path / "q.safetensors", tensors))
    assert str(caught.value).startswith(str(tmp_path / "q.safetensors"))
    for part in ("expected: ", "found: ", "to do: "):
        assert part in str(caught.value)


def test_a_base_in_8_bits(sdxl, tmp_path):
    """Its fused projections are cut after they are widened, with a scale for each output."""
    fused = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    conv = f"{UNET}input_blocks.1.0.in_layers.2.weight"
    small = {name: value.to(torch.float8_e4m3fn) for name, value in sdxl.items()}
    small[conv.replace(".weight", ".scale_weight")] = torch.rand(32) + 0.5
    small[f"{UNET}scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    found = open_sdxl(saved(tmp_path / "fp8.safetensors", small)).tensors
    scale = small[conv.replace(".weight", ".scale_weight")].double().reshape(-1, 1, 1, 1)
    weight = found["unet.down_blocks.0.resnets.0.conv1.weight"].read()
    np.testing.assert_array_equal(weight, (small[conv].double() * scale).numpy())
    query = found["text_encoder_2.encoder.layers.0.self_attn.q_proj.weight"].read()
    np.testing.assert_array_equal(query, small[fused].float().numpy()[:128])


# -- what a model predicts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marks", "what"),
    [
        ({"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, "v-prediction"),
        ({"v_pred": torch.tensor([], dtype=torch.uint8)}, "v-prediction"),
        ({"ztsnr": torch.tensor([])}, "zero terminal SNR"),
        ({f"{UNET}v_pred": torch.tensor([])}, "v-prediction"),
        ({"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, "Playground"),
        ({"edm_vpred.sigma_max": torch.tensor(120.0)}, "CosXL"),
    ],
)
def test_marks_of_other_predictions(sdxl, tmp_path, marks, what):
    file = saved(tmp_path / "sdxl.safetensors", sdxl | marks)
    for opener in (open_sdxl, open_unet):
        with pytest.raises(
            CheckpointError, match=f"(?s)sdxl.safetensors: .*does not predict noise.*{what}.*found.*to do"
        ):
            opener(file)


@pytest.mark.parametrize(
    ("metadata", "what"),
    [
        ({"modelspec.prediction_type": "v"}, "v-prediction"),
        ({"modelspec.prediction_type": "v_prediction"}, "v-prediction"),
        ({"modelspec.prediction_type": "flow"}, "flow"),
        ({"ss_v_parameterization": "True"}, "v-prediction"),
        ({"ss_v2": "true"}, "Stable Diffusion 2"),
        ({"ss_zero_terminal_snr": "1"}, "zero terminal SNR"),
        ({"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "False", "ss_v2": "None"}, None),
        ({"modelspec.prediction_type": ""}, None),
    ],
)
def test_metadata_of_other_predictions(sdxl, tmp_path, metadata, what):
    file = saved(tmp_path / "sdxl.safetensors", sdxl, metadata)
    if what is None:
        assert open_sdxl(file).tensors
    else:
        with pytest.raises(CheckpointError, match=f"(?s)does not predict noise.*{what}.*in its metadata"):
            open_sdxl(file)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"prediction_type": "v_prediction"}, "v-prediction"),
        ({"prediction_type": "sample"}, "sample"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon"}, "Playground"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow"),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}, None),
        ({"prediction_type": None}, None),
        ("[", "configuration is damaged"),
    ],
)
def test_schedulers_of_diffusers_folders(tiny, tmp_path, config, what):
    folder = layouts.write_diffusers_folder(tiny.sdxl, tmp_path / "m")
    (folder / "scheduler").mkdir()
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "scheduler" / "scheduler_config.json").write_text(text)
    for opener in (open_sdxl, open_unet):
        if what is None:
            assert opener(folder).tensors
        else:
            with pytest.raises(CheckpointError, match=f"(?s)scheduler_config.json: .*{what}"):
                opener(folder)


# -- what a model is for ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "what"), [(9, "an inpainting model"), (8, "InstructPix2Pix"), (5, "for another task")]
)
def test_unets_that_see_more_than_the_latent(tiny, sdxl, tmp_path, channels, what):
    name = f"{UNET}input_blocks.0.0.weight"
    wide = sdxl | {name: torch.zeros(32, channels, 3, 3)}
    bare = {key.removeprefix(UNET): value for key, value in wide.items() if key.startswith(UNET)}
    folder = layouts.write_diffusers_folder(tiny.sdxl, tmp_path / "m")
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    layouts.edit(unet, unet, add={"conv_in.weight": np.zeros((32, channels, 3, 3), np.float32)})
    for opener, path in (
        (open_sdxl, saved(tmp_path / "sdxl.safetensors", wide)),
        (open_unet, saved(tmp_path / "unet.safetensors", bare)),
        (open_unet, unet),
        (open_sdxl, folder),
        (open_unet, folder),
    ):
        with pytest.raises(CheckpointError, match=f"(?s)the model is .*{what}.*{channels} input channels"):
            opener(path)


@pytest.mark.parametrize("names", ["LDM", "diffusers", "folder"])
def test_refiners(tmp_path, names):
    """Their UNet sees bigG alone; in a folder, the first text encoder is missing, which would be told instead."""
    attention = "transformer_blocks.0.attn2.to_k.weight"
    if names == "LDM":
        tensors = {"input_blocks.4.1." + attention: (768, 1280), "label_emb.0.0.weight": (1536, 2560)}
    else:
        tensors = {
            "down_blocks.1.attentions.0." + attention: (768, 1280),
            "add_embedding.linear_1.weight": (1536, 2560),
        }
    values = {name: torch.empty(shape, dtype=torch.float16) for name, shape in tensors.items()}
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    path.parent.mkdir()
    saved(path, values)
    opener, given = (open_sdxl, tmp_path) if names == "folder" else (open_unet, path)
    with pytest.raises(CheckpointError, match="(?s)the model is SDXL's refiner.*bigG alone"):
        opener(given)
