import json
from pathlib import Path

import pytest

from export.checkpoint.checkpoint import keymap
from export.checkpoint.keymap import Target, ldm_name, open_clip_targets, unet_ldm_names, unet_target, vae_target

MANIFEST = Path(__file__).parent.parent / "data" / "full_manifest.json"
UNET, CONTROL = "model.diffusion_model.", "model.control_model."


@pytest.fixture(scope="module")
def full_names():
    """Every tensor name of the real SDXL and SUPIR files."""
    files = json.loads(MANIFEST.read_text())["files"]
    return [name for tensors in files.values() for name in tensors]


def behind(names, prefix):
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix) and "project_modules" not in name]


@pytest.mark.parametrize(("prefix", "net"), [(UNET, "unet"), (CONTROL, "controlnet")])
def test_every_real_unet_name_has_a_place_and_comes_back(full_names, prefix, net):
    names = [name for name in behind(full_names, prefix) if name != "mask_LQ"]
    assert len(names) == {"unet": 1680, "controlnet": 810}[net]
    targets = [unet_target(name, net) for name in names]
    assert None not in targets
    assert len({target.name for target in targets}) == len(names)
    for name, target in zip(names, targets, strict=True):
        assert name in unet_ldm_names(target.name.removeprefix(f"{net}."))
        assert ldm_name(target.name) == prefix + name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("input_blocks.0.0.weight", "unet.conv_in.weight"),
        ("input_blocks.3.0.op.bias", "unet.down_blocks.0.downsamplers.0.conv.bias"),
        ("input_blocks.7.0.skip_connection.weight", "unet.down_blocks.2.resnets.0.conv_shortcut.weight"),
        (
            "input_blocks.8.1.transformer_blocks.9.attn2.to_out.0.bias",
            "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0.bias",
        ),
        ("middle_block.2.emb_layers.1.weight", "unet.mid_block.resnets.1.time_emb_proj.weight"),
        ("output_blocks.2.2.conv.weight", "unet.up_blocks.0.upsamplers.0.conv.weight"),
        ("output_blocks.8.0.out_layers.3.weight", "unet.up_blocks.2.resnets.2.conv2.weight"),
        ("label_emb.0.2.bias", "unet.add_embedding.linear_2.bias"),
        ("out.2.weight", "unet.conv_out.weight"),
    ],
)
def test_unet_examples(name, expected):
    # diffusers' names, as diffusers' own SDXL UNet has them.
    assert unet_target(name) == Target(expected)


@pytest.mark.parametrize("name", ["input_blocks.9.0.weight", "input_blocks.1.0.conv.weight", "foo", "out.1.weight"])
def test_unknown_unet_names_have_no_place(name):
    assert unet_target(name) is None


def test_every_real_vae_name_has_a_place(full_names):
    names = behind(full_names, "first_stage_model.")
    own = [name for name in names if not name.startswith("denoise_encoder.")]
    assert keymap.vae_levels(iter(own)) == 4
    targets = [vae_target(name, 4) for name in own]
    assert len({target.name for target in targets}) == len(own)
    for name, target in zip(own, targets, strict=True):
        assert ldm_name(target.name) == f"first_stage_model.{name}"
        assert target.part == (
            "matrix"
            if ".attn_1." in name and name.endswith(("q.weight", "k.weight", "v.weight", "proj_out.weight"))
            else "whole"
        )
    denoise = [name.removeprefix("denoise_encoder.") for name in names if name.startswith("denoise_encoder.")]
    for name in denoise:
        target = vae_target(f"encoder.{name}", 4, "denoise_encoder")
        assert ldm_name(target.name) == f"first_stage_model.denoise_encoder.{name}"


def test_the_decoder_is_counted_from_the_other_end():
    assert vae_target("decoder.up.3.block.0.conv1.weight", 4).name == "vae.decoder.up_blocks.0.resnets.0.conv1.weight"
    assert vae_target("decoder.up.1.upsample.conv.bias", 3).name == "vae.decoder.up_blocks.1.upsamplers.0.conv.bias"


def test_every_real_connector_name_comes_back(full_names):
    prefix = f"{UNET}project_modules."
    names = [name.removeprefix(prefix) for name in full_names if name.startswith(prefix)]
    assert len(names) == 118
    for name in names:
        assert ldm_name(keymap.connector_target(name).name) == prefix + name


def test_every_real_open_clip_name_has_a_place(full_names):
    names = behind(full_names, "conditioner.embedders.1.model.")
    targets = [target for name in names for target in open_clip_targets(name, "t")]
    assert len({target.name for target in targets}) == len(targets)
    assert [name for name in names if not open_clip_targets(name, "t")] == ["logit_scale"]


def test_fused_projections_give_three_and_the_projection_is_transposed():
    targets = open_clip_targets("transformer.resblocks.3.attn.in_proj_bias", "t")
    assert [(target.name, target.part) for target in targets] == [
        (f"t.encoder.layers.3.self_attn.{part}_proj.bias", part) for part in "qkv"
    ]
    assert open_clip_targets("text_projection", "t") == (Target("t.text_projection.weight", "transposed"),)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.mid_block.attentions.0.query.weight", "vae.encoder.mid_block.attentions.0.to_q.weight"),
        ("decoder.mid_block.attentions.0.proj_attn.bias", "vae.decoder.mid_block.attentions.0.to_out.0.bias"),
        ("decoder.mid_block.attentions.0.to_v.weight", "vae.decoder.mid_block.attentions.0.to_v.weight"),
        ("quant_conv.weight", "vae.quant_conv.weight"),
    ],
)
def test_old_and_new_diffusers_vae_names(name, expected):
    assert keymap.diffusers_vae_target(name).name == expected
