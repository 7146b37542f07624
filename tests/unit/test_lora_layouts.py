"""One pair under every name that trainers and programs give it, against the same pair under kohya's."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

import layouts
from golden import relative_l2
from safetensors.numpy import save_file

from engine.errors import LoraError
from export.checkpoint.lora import merge_into, open_lora
from export.checkpoint.lora_names import _HEADS, LayerNames, _names

MANIFEST = Path(__file__).parent.parent / "data" / "full_manifest.json"
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
LDM_ATTENTION = "input_blocks.4.1.transformer_blocks.0.attn1"
Q, OUT, CONV = f"unet.{ATTENTION}.to_q", f"unet.{ATTENTION}.to_out.0", "unet.down_blocks.0.resnets.0.conv1"
LAYER = "encoder.layers.0.self_attn"
CLIP_L, CLIP_L_OUT = f"text_encoder.{LAYER}.q_proj", f"text_encoder.{LAYER}.out_proj"
BIG_G, PROJECTION = f"text_encoder_2.{LAYER}.q_proj", "text_encoder_2.text_projection"
RANK = 4
rng = np.random.default_rng(1)


def flat(layer):
    return layer.replace(".", "_")


#: What a layer is called, and how the pair's tensors end, in each layout.
NAMES = {
    "kohya": ({Q: f"lora_unet_{flat(ATTENTION)}_to_q", BIG_G: f"lora_te2_text_model_{flat(LAYER)}_q_proj"}, "kohya"),
    "kohya, LDM": ({Q: f"lora_unet_{flat(LDM_ATTENTION)}_to_q"}, "kohya"),
    "kohya, text projection": ({PROJECTION: "lora_te2_text_projection"}, "kohya"),
    "kohya, dotted": ({Q: f"lora_unet.{ATTENTION}.to_q", CLIP_L: f"lora_te1.text_model.{LAYER}.q_proj"}, "kohya"),
    "LyCORIS, SimpleTuner": (
        {Q: f"lycoris_{flat(ATTENTION)}_to_q", OUT: f"lycoris_{flat(ATTENTION)}_to_out_0"},
        "kohya",
    ),
    "OneTrainer": (
        {
            Q: f"unet.{LDM_ATTENTION}.to_q",
            CLIP_L: f"clip_l.text_model.{LAYER}.q_proj",
            BIG_G: f"clip_g.text_model.{LAYER}.q_proj",
            PROJECTION: "clip_g.text_projection",
        },
        "kohya",
    ),
    "diffusers 0.15 to 0.21": (
        {
            Q: f"unet.{ATTENTION}.processor.to_q_lora",
            OUT: f"unet.{ATTENTION}.processor.to_out_lora",
            CLIP_L: f"text_encoder.text_model.{LAYER}.to_q_lora",
            CLIP_L_OUT: f"text_encoder.text_model.{LAYER}.to_out_lora",
        },
        "processor",
    ),
    "diffusers' processors alone": ({Q: f"{ATTENTION}.processor.to_q_lora"}, "processor"),
    "diffusers 0.21": (
        {
            Q: f"unet.{ATTENTION}.to_q",
            CONV: CONV,
            CLIP_L: f"text_encoder.text_model.{LAYER}.q_proj",
            PROJECTION: "text_encoder_2.text_projection",
        },
        "lora",
    ),
    "diffusers 0.21, text": ({CLIP_L: f"text_encoder.text_model.{LAYER}.q_proj"}, "lora_linear_layer"),
    "diffusers, PEFT": (
        {Q: Q, OUT: OUT, BIG_G: f"text_encoder_2.text_model.{LAYER}.q_proj", PROJECTION: PROJECTION},
        "PEFT",
    ),
    "PEFT around a UNet": ({Q: f"base_model.model.{ATTENTION}.to_q"}, "PEFT"),
    "PEFT around a pipeline": ({Q: f"base_model.model.unet.{ATTENTION}.to_q"}, "PEFT"),
    "compiled": ({Q: f"unet._orig_mod.{ATTENTION}.to_q"}, "PEFT"),
    "ComfyUI": (
        {
            Q: f"diffusion_model.{LDM_ATTENTION}.to_q",
            CLIP_L: f"text_encoders.clip_l.transformer.text_model.{LAYER}.q_proj",
            BIG_G: f"text_encoders.clip_g.transformer.text_model.{LAYER}.q_proj",
            PROJECTION: "text_encoders.clip_g.transformer.text_projection",
        },
        "kohya",
    ),
    "ComfyUI, flat": ({CLIP_L: f"text_encoders_clip_l_transformer_text_model_{flat(LAYER)}_q_proj"}, "kohya"),
    "ComfyUI's model": ({Q: f"model.diffusion_model.{LDM_ATTENTION}.to_q"}, "PEFT"),
}
ENDS = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "PEFT": (".lora_A.weight", ".lora_B.weight"),
    "lora": (".lora.down.weight", ".lora.up.weight"),
    "lora_linear_layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "processor": (".down.weight", ".up.weight"),
}


def pair(shape):
    down = rng.standard_normal((RANK, *shape[1:])).astype(np.float32)
    return down, rng.standard_normal((shape[0], RANK, *(1,) * (len(shape) - 2))).astype(np.float32)


def product(down, up, shape):
    return (up.reshape(shape[0], -1).astype(np.float64) @ down.reshape(RANK, -1).astype(np.float64)).reshape(shape)


def assert_merges(path, base, shapes, expected, alphas=(float(RANK),)):
    lora = open_lora("test", path, 1.0, shapes)
    assert set(lora.deltas) == {f"{layer}.weight" for layer in expected}
    assert lora.alphas == alphas
    for layer, change in expected.items():
        weight = base[f"{layer}.weight"].read()
        assert relative_l2(merge_into(weight, f"{layer}.weight", [lora]) - weight, change) < 1e-6, layer
    return lora


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("layout", NAMES)
def test_every_layout_is_the_same_pair(base, shapes, tmp_path, layout, suffix):
    names, ends = NAMES[layout]
    tensors, expected = {}, {}
    for layer, called in names.items():
        down, up = pair(shapes[f"{layer}.weight"])
        tensors |= {called + ENDS[ends][0]: down, called + ENDS[ends][1]: up}
        expected[layer] = product(down, up, shapes[f"{layer}.weight"])
    file = tmp_path / f"lora{suffix}"
    if suffix == ".bin":
        torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, file)
    else:
        save_file(tensors, file)
    assert_merges(file, base, shapes, expected)
    # Each layer's alpha, in the same layout, halves it.
    halved = tensors | {f"{called}.alpha": np.array(RANK / 2, np.float32) for called in names.values()}
    save_file(halved, tmp_path / "alpha.safetensors")
    halves = {layer: change / 2 for layer, change in expected.items()}
    assert_merges(tmp_path / "alpha.safetensors", base, shapes, halves, (RANK / 2,))


def test_no_name_means_two_layers():
    """Of SDXL's own layers, under every name, dotted and flat."""
    layers = [name for name in layouts.our_shapes(MANIFEST) if name.endswith(".weight")]
    names = LayerNames(layers)
    owners: dict[str, str] = {}
    for weight in layers:
        component, _, rest = weight.removesuffix(".weight").partition(".")
        if component not in set(_HEADS.values()):
            assert names.find(weight.removesuffix(".weight")) is None
            continue
        for name in _names(component, rest):
            for head in (head for head, owner in _HEADS.items() if owner == component):
                for called in (f"{head}.{name}", f"{head}_{name}".replace(".", "_")):
                    assert owners.setdefault(called, weight) == weight
                    assert f"{names.find(called)}.weight" == weight


def test_words_beside_a_lora_are_left_out_and_told(base, shapes, tmp_path):
    down, up = pair(shapes[f"{Q}.weight"])
    tensors = {f"lora_unet_{flat(ATTENTION)}_to_q.lora_{part}.weight": v for part, v in (("down", down), ("up", up))}
    words = {f"bundle_emb.ohwx.{tower}": np.zeros((2, 8), np.float32) for tower in ("clip_l", "clip_g")}
    save_file(tensors | words, tmp_path / "lora.safetensors")
    lora = assert_merges(tmp_path / "lora.safetensors", base, shapes, {Q: product(down, up, shapes[f"{Q}.weight"])})
    assert set(lora.left_out) == set(words)
    assert lora.warnings == (
        f"embeddings of words are left out, as no text here uses them: {', '.join(lora.left_out)}",
    )
    save_file({"clip_l": np.zeros((2, 8), np.float32)}, tmp_path / "words.safetensors")
    with pytest.raises(LoraError, match="(?s)holds no tensors of a LoRA.*textual inversions"):
        open_lora("words", tmp_path / "words.safetensors", 1.0, shapes)


def test_a_lora_for_v_prediction_is_merged_and_told(base, shapes, tmp_path):
    down, up = pair(shapes[f"{Q}.weight"])
    save_file(
        {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up},
        tmp_path / "lora.safetensors",
        metadata={"ss_v_parameterization": "True"},
    )
    change = product(down, up, shapes[f"{Q}.weight"])
    lora = assert_merges(tmp_path / "lora.safetensors", base, shapes, {Q: change})
    assert "trained for v-prediction" in lora.warnings[0]


# -- folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_that_diffusers_wrote(base, shapes, tmp_path, safe):
    from diffusers import StableDiffusionXLPipeline

    expected, parts = {}, {"unet": {}, "text_encoder": {}, "text_encoder_2": {}}
    for layer in (Q, OUT, CLIP_L, BIG_G):
        component, _, inside = layer.partition(".")
        down, up = pair(shapes[f"{layer}.weight"])
        prefix = "" if component == "unet" else "text_model."
        parts[component] |= {
            f"{prefix}{inside}.lora_A.weight": torch.from_numpy(down),
            f"{prefix}{inside}.lora_B.weight": torch.from_numpy(up),
        }
        expected[layer] = product(down, up, shapes[f"{layer}.weight"])
    metadata = {"r": RANK, "lora_alpha": 2, "rank_pattern": {}, "alpha_pattern": {}} if safe else None
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=parts["unet"],
        text_encoder_lora_layers=parts["text_encoder"],
        text_encoder_2_lora_layers=parts["text_encoder_2"],
        safe_serialization=safe,
        unet_lora_adapter_metadata=metadata,
    )
    if safe:  # the UNet's alone has a configuration
        expected = {layer: change / (2 if layer.startswith("unet.") else 1) for layer, change in expected.items()}
    assert_merges(tmp_path, base, shapes, expected, (2.0, 4.0) if safe else (4.0,))


def test_folders_of_one_file_and_of_several(base, shapes, tmp_path):
    down, up = pair(shapes[f"{Q}.weight"])
    save_file({f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}, tmp_path / "mine.safetensors")
    (tmp_path / "README.md").write_text("a LoRA")
    assert_merges(tmp_path, base, shapes, {Q: product(down, up, shapes[f"{Q}.weight"])})
    (tmp_path / "other.safetensors").write_bytes((tmp_path / "mine.safetensors").read_bytes())
    with pytest.raises(LoraError, match=r"(?s)several files.*mine\.safetensors, other\.safetensors.*name the file"):
        open_lora("face", tmp_path, 1.0, shapes)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoraError, match="(?s)a folder without a LoRA.*pytorch_lora_weights"):
        open_lora("face", tmp_path / "empty", 1.0, shapes)


def test_the_configuration_decides_whether_a_bundle_is_up_to_date(tiny, shapes, tmp_path):
    from export.build.build_plan import make_plan
    from export.build.request import BuildRequest, LoraRequest

    down, up = pair(shapes[f"{Q}.weight"])
    inside = Q.removeprefix("unet.")
    save_file(
        {f"base_model.model.{inside}.lora_A.weight": down, f"base_model.model.{inside}.lora_B.weight": up},
        tmp_path / "adapter_model.safetensors",
    )
    lora = LoraRequest("face", tmp_path, 1.0)
    request = BuildRequest(
        tiny.sdxl, tiny.supir, tiny.tokenizer, tmp_path / "b", preset="lightning-lora", loras=(lora,)
    )
    keys = []
    for alpha in (8, 16):
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        plan = make_plan(request)
        assert plan.describe()["merge"][0]["alphas"] == (alpha,)
        keys.append(plan.key(plan.hash_sources()))
    assert keys[0] != keys[1]
