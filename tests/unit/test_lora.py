"""LoRAs of every format against W + Σ s·(α/r)·up·down computed here, in NumPy, in float64."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from golden import relative_l2
from safetensors.numpy import save_file

from engine.errors import LoraError
from export.checkpoint.lora import LoadedLora, merge_into, open_lora

RANK = 4
LINEAR = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
CROSS = "unet.up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_k.weight"
CONV3 = "unet.down_blocks.0.resnets.0.conv1.weight"
CONV1 = "unet.down_blocks.1.resnets.0.conv_shortcut.weight"
UPSAMPLER = "unet.up_blocks.0.upsamplers.0.conv.weight"
CLIP_L = "text_encoder.encoder.layers.0.self_attn.q_proj.weight"
BIG_G = "text_encoder_2.encoder.layers.1.mlp.fc1.weight"

rng = np.random.default_rng(0)


def pair(shape, rank=RANK):
    """Random down and up matrices for a weight, in the shapes that trainers write."""
    down = rng.standard_normal((rank, *shape[1:])).astype(np.float32)
    up = rng.standard_normal((shape[0], rank, *(1,) * (len(shape) - 2))).astype(np.float32)
    return down, up


def product(up, down, shape):
    return (up.reshape(up.shape[0], -1).astype(np.float64) @ down.reshape(down.shape[0], -1)).reshape(shape)


def assert_merges(path, base, shapes, target, expected_delta, scale=1.0, count=1):
    lora = open_lora("test", path, scale, shapes)
    assert len(lora.deltas) == count
    weight = base[target].read()
    before = weight.copy()
    merged = merge_into(weight, target, [lora])
    assert merged.dtype == np.float64
    assert np.array_equal(weight, before)
    expected = weight.astype(np.float64) + scale * expected_delta
    assert relative_l2(merged, expected) < 1e-14
    assert relative_l2(weight, expected) > 1e-3  # the change is not lost in rounding
    return lora


KOHYA = {
    LINEAR: [
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
    ],
    CROSS: [
        "lora_unet_output_blocks_2_1_transformer_blocks_1_attn2_to_k",
        "lora_unet_up_blocks_0_attentions_2_transformer_blocks_1_attn2_to_k",
    ],
    CONV3: ["lora_unet_input_blocks_1_0_in_layers_2", "lora_unet_down_blocks_0_resnets_0_conv1"],
    CONV1: ["lora_unet_input_blocks_4_0_skip_connection"],
    UPSAMPLER: ["lora_unet_output_blocks_2_2_conv", "lora_unet_up_blocks_0_upsamplers_0_conv"],
    CLIP_L: ["lora_te1_text_model_encoder_layers_0_self_attn_q_proj"],
    BIG_G: ["lora_te2_text_model_encoder_layers_1_mlp_fc1"],
}


@pytest.mark.parametrize("scale", [1.0, 0.5, -0.7])
@pytest.mark.parametrize(("target", "module"), [(target, name) for target, names in KOHYA.items() for name in names])
def test_kohya(base, shapes, tmp_path, target, module, scale):
    down, up = pair(shapes[target])
    alpha = np.array(2.0, np.float32)
    file = tmp_path / "lora.safetensors"
    save_file({f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up, f"{module}.alpha": alpha}, file)
    lora = assert_merges(file, base, shapes, target, 2.0 / RANK * product(up, down, shapes[target]), scale)
    assert (lora.ranks, lora.alphas) == ((RANK,), (2.0,))


PEFT = {
    LINEAR: "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    CONV3: "unet.down_blocks.0.resnets.0.conv1",
    CLIP_L: "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    BIG_G: "text_encoder_2.text_model.encoder.layers.1.mlp.fc1",
}


@pytest.mark.parametrize(
    ("down_name", "up_name"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora.down.weight", "lora.up.weight"),
    ],
)
@pytest.mark.parametrize(("target", "module"), PEFT.items())
def test_peft_and_diffusers(base, shapes, tmp_path, target, module, down_name, up_name):
    down, up = pair(shapes[target])
    save_file({f"{module}.{down_name}": down, f"{module}.{up_name}": up}, tmp_path / "lora.safetensors")
    # No alpha means alpha = rank.
    assert_merges(tmp_path / "lora.safetensors", base, shapes, target, product(up, down, shapes[target]))


@pytest.mark.parametrize(
    "module",
    [
        "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    ],
)
def test_bare_and_ldm_dotted_names(base, shapes, tmp_path, module):
    down, up = pair(shapes[LINEAR])
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    assert_merges(tmp_path / "lora.safetensors", base, shapes, LINEAR, product(up, down, shapes[LINEAR]))


def test_a_kernel_in_the_middle(base, shapes, tmp_path):
    out_channels, in_channels, *kernel = shapes[CONV3]
    up = rng.standard_normal((out_channels, RANK, 1, 1)).astype(np.float32)
    mid = rng.standard_normal((RANK, RANK, *kernel)).astype(np.float32)
    down = rng.standard_normal((RANK, in_channels, 1, 1)).astype(np.float32)
    module = "lora_unet_input_blocks_1_0_in_layers_2"
    parts = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}
    save_file({f"{module}.{name}": value for name, value in parts.items()}, tmp_path / "lora.safetensors")
    expected = np.zeros(shapes[CONV3])
    for y in range(kernel[0]):
        for x in range(kernel[1]):
            expected[:, :, y, x] = up[:, :, 0, 0].astype(np.float64) @ mid[:, :, y, x] @ down[:, :, 0, 0]
    assert_merges(tmp_path / "lora.safetensors", base, shapes, CONV3, expected)


def test_linear_lora_written_as_a_convolution(base, shapes, tmp_path):
    down, up = pair(shapes[LINEAR])
    module = KOHYA[LINEAR][0]
    values = {f"{module}.lora_down.weight": down[:, :, None, None], f"{module}.lora_up.weight": up[:, :, None, None]}
    save_file(values, tmp_path / "lora.safetensors")
    assert_merges(tmp_path / "lora.safetensors", base, shapes, LINEAR, product(up, down, shapes[LINEAR]))


def test_alpha_from_a_saved_peft_model(base, shapes, tmp_path):
    """Saved by PEFT itself: alpha is in adapter_config.json, not among the tensors."""
    from peft import LoraConfig, get_peft_model

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            names = LINEAR.removeprefix("unet.").removesuffix(".weight").split(".")
            owner = self
            for name in names[:-1]:
                child = torch.nn.Module()
                owner.add_module(name, child)
                owner = child
            owner.add_module(names[-1], torch.nn.Linear(*shapes[LINEAR][::-1], bias=False))

    for rslora in (False, True):
        config = LoraConfig(r=RANK, lora_alpha=8, target_modules=["to_q"], use_rslora=rslora)
        model = get_peft_model(Tower(), config)
        parameters = {name.split(".lora_")[1][0]: p for name, p in model.named_parameters() if "lora_" in name}
        torch.nn.init.normal_(parameters["B"])
        folder = tmp_path / f"peft{rslora}"
        model.save_pretrained(folder)
        up, down = parameters["B"].detach().numpy(), parameters["A"].detach().numpy()
        scaling = 8 / np.sqrt(RANK) if rslora else 8 / RANK
        assert_merges(folder, base, shapes, LINEAR, scaling * product(up, down, shapes[LINEAR]))


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_alpha_from_the_metadata_that_diffusers_writes(base, shapes, tmp_path, prefix):
    down, up = pair(shapes[LINEAR])
    module = prefix + LINEAR.removeprefix("unet.").removesuffix(".weight")
    config = {
        f"{prefix}r": RANK,
        f"{prefix}lora_alpha": 3,
        f"{prefix}alpha_pattern": {"attn2.to_k": 99, "attn1.to_q": 6},
    }
    save_file(
        {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up},
        tmp_path / "lora.safetensors",
        metadata={"lora_adapter_metadata": json.dumps(config)},
    )
    assert_merges(tmp_path / "lora.safetensors", base, shapes, LINEAR, 6 / RANK * product(up, down, shapes[LINEAR]))


def test_several_loras_add_up_in_float64(base, shapes, tmp_path):
    weight = base[LINEAR].read().astype(np.float16)
    loras, expected = [], weight.astype(np.float64)
    for index, scale in enumerate((1.0, 0.25, -1.5)):
        down, up = pair(shapes[LINEAR], rank=2 + index)
        file = tmp_path / f"{index}.safetensors"
        save_file({f"{KOHYA[LINEAR][0]}.lora_down.weight": down, f"{KOHYA[LINEAR][0]}.lora_up.weight": up}, file)
        loras.append(open_lora(f"l{index}", file, scale, shapes))
        expected = expected + scale * product(up, down, shapes[LINEAR])
    merged = merge_into(weight, LINEAR, loras)
    assert merged.dtype == np.float64
    assert relative_l2(merged, expected) < 1e-14


def test_scale_zero_is_the_identity_to_the_bit(base, shapes, tmp_path):
    down, up = pair(shapes[LINEAR])
    file = tmp_path / "lora.safetensors"
    save_file({f"{KOHYA[LINEAR][0]}.lora_down.weight": down, f"{KOHYA[LINEAR][0]}.lora_up.weight": up}, file)
    weight = base[LINEAR].read().copy()
    weight[0, 0] = -0.0  # which adding zero would turn into 0.0
    merged = merge_into(weight, LINEAR, [open_lora("off", file, 0.0, shapes)])
    assert merged is weight


def test_weights_that_no_lora_names_are_left_alone(base):
    weight = base[CONV1].read()
    assert merge_into(weight, CONV1, [LoadedLora("empty", None, 1.0)]) is weight


def test_the_demos_loras_hit_every_attention(tiny, shapes):
    lora = open_lora("face", tiny.loras["face"], 1.0, shapes)
    attention = [name for name in shapes if name.startswith("unet.") and ".attn" in name and name.endswith("weight")]
    assert sorted(lora.deltas) == sorted(attention)


# -- refusals -------------------------------------------------------------------------------------

MODULE = KOHYA[LINEAR][0]


def tensors(**changes):
    down, up = np.ones((RANK, 64), np.float32), np.ones((64, RANK), np.float32)
    values = {f"{MODULE}.lora_down.weight": down, f"{MODULE}.lora_up.weight": up}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in values.items() if value is not None}


def with_module(module, suffixes=("lora_down.weight", "lora_up.weight")):
    down, up = np.ones((RANK, 64), np.float32), np.ones((64, RANK), np.float32)
    return {f"{module}.{suffixes[0]}": down, f"{module}.{suffixes[1]}": up}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (tensors(**{f"{MODULE}__diff": np.ones(64, np.float32)}), "two kinds of change for one weight"),
        (tensors(**{f"{MODULE}__lora_B__bias": np.ones(64, np.float32)}), "(?s)does not fit the base.*no bias"),
        (tensors(**{f"{MODULE}__bogus": np.ones(64, np.float32)}), "no part of a LoRA"),
        (
            with_module("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"),
            "for another model: none",
        ),
        (with_module("lora_te_text_model_encoder_layers_0_self_attn_q_proj"), "for another model: none"),
        ({**tensors(), **with_module("lora_unet_nonsense")}, "(?s)1 of its 2 layers match nothing.*lora_unet_nonsense"),
        (tensors(**{f"{MODULE}__lora_up__weight": None}), "(?s)half of a pair is missing.*up matrix"),
        (
            tensors(**{f"{MODULE}__lora_down__weight": np.ones((4, 768), np.float32)}),
            r"(?s)does not fit.*\[64, 64\].*768",
        ),
        (tensors(**{f"{MODULE}__lora_down__weight": np.ones((8, 64), np.float32)}), "does not fit the base"),
        (tensors(**{f"{MODULE}__alpha": np.array(np.nan, np.float32)}), "alpha is not a number"),
        (tensors(**{f"{MODULE}__alpha": np.ones(2, np.float32)}), "alpha is not one number"),
        (tensors(**{f"{MODULE}__lora_down__weight": np.ones((), np.float32)}), "does not fit the base"),
        (tensors(**{f"{MODULE}__lora_down__weight": np.ones((0, 64), np.float32)}), "does not fit the base"),
        ({}, "holds no tensors"),
        (
            {**with_module(LINEAR.removesuffix(".weight"), ("lora_A.weight", "lora_B.weight"))}
            | with_module(LINEAR.removesuffix(".weight"), ("lora_A.other.weight", "lora_B.other.weight")),
            "(?s)holds two adapters.*a file of its own",
        ),
        (
            {  # a 1×1 kernel says nothing of the other eight places of a 3×3 weight
                f"{KOHYA[CONV3][0]}.lora_down.weight": np.ones((RANK, 32, 1, 1), np.float32),
                f"{KOHYA[CONV3][0]}.lora_up.weight": np.ones((32, RANK, 1, 1), np.float32),
            },
            "does not fit the base",
        ),
        ({**tensors(), **with_module(KOHYA[LINEAR][1])}, "two of its layers change one weight"),
    ],
)
def test_what_cannot_be_merged_is_told(shapes, tmp_path, values, message):
    file = tmp_path / "bad.safetensors"
    save_file(values, file)
    with pytest.raises(LoraError, match=message) as caught:
        open_lora("face", file, 1.0, shapes)
    for part in ("LoRA face: ", "bad.safetensors", "expected: ", "found: ", "to do: "):
        assert part in str(caught.value)


def test_a_base_given_as_a_lora_is_told(tiny, shapes):
    with pytest.raises(LoraError, match=r"(?s)no part of a LoRA.*looks like: SUPIR"):
        open_lora("face", tiny.supir, 1.0, shapes)


@pytest.mark.parametrize("make", [lambda file: None, lambda file: file.write_bytes(b"12345678")])
def test_missing_and_damaged_files_are_told(shapes, tmp_path, make):
    make(tmp_path / "lora.safetensors")
    with pytest.raises(LoraError, match="LoRA face: .*(no such file|not a whole safetensors file)"):
        open_lora("face", tmp_path / "lora.safetensors", 1.0, shapes)


@pytest.mark.parametrize(
    "config",
    [
        "{",
        '{"use_dora": true}',
        '{"peft_type": "LOHA"}',
        "[]",
        '{"lora_alpha": "much"}',
        '{"init_lora_weights": "pissa_niter_4"}',
        '{"init_lora_weights": "olora"}',
    ],
)
def test_configurations_that_cannot_be_merged_are_told(shapes, tmp_path, config):
    save_file(tensors(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(LoraError, match="configuration|unsupported kind"):
        open_lora("face", tmp_path, 1.0, shapes)


def test_values_that_are_not_finite_are_told(base, shapes, tmp_path):
    values = tensors()
    values[f"{MODULE}.lora_up.weight"][3, 2] = np.inf
    save_file(values, tmp_path / "bad.safetensors")
    lora = open_lora("face", tmp_path / "bad.safetensors", 1.0, shapes)
    with pytest.raises(LoraError, match=f"(?s){MODULE}.lora_up.weight: .*not finite"):
        merge_into(base[LINEAR].read(), LINEAR, [lora])


def test_a_whole_alpha_is_a_number(base, shapes, tmp_path):
    down, up = pair(shapes[LINEAR])
    values = {f"{MODULE}.lora_down.weight": down, f"{MODULE}.lora_up.weight": up, f"{MODULE}.alpha": np.array(2)}
    save_file(values, tmp_path / "lora.safetensors")
    expected = 2 / RANK * product(up, down, shapes[LINEAR])
    assert_merges(tmp_path / "lora.safetensors", base, shapes, LINEAR, expected)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_are_numbers(tiny, shapes, scale):
    with pytest.raises(LoraError, match="scale is not a number"):
        open_lora("face", tiny.loras["face"], scale, shapes)
