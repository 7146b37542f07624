"""Names of tensors: LDM and open_clip (single files), diffusers and transformers (folders), ours.

Pure renaming, no tensors. Ours are diffusers' and transformers' names behind the component's:
`unet.down_blocks.0.…`, `connectors.3.…`, `vae.encoder.…`, `text_encoder_2.encoder.layers.0.…`.
Blocks are paired in tables that are read in both directions: LDM to ours for checkpoints, ours to
LDM for LoRA names and for error messages in the words of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

#: How a tensor of ours is cut from the one in the file: as it is; a 1×1 convolution as a matrix;
#: transposed; or the first, second or third part of a fused projection.
Part = Literal["whole", "matrix", "transposed", "q", "k", "v"]

_LEVELS = 3
_RESNETS = 2
_MAX_VAE_RESNETS = 3


@dataclass(frozen=True)
class Target:
    """A tensor of ours, and which part of the file's tensor it is."""

    name: str
    part: Part = "whole"


# -- the UNet and the ControlNet ------------------------------------------------------------------

_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _unet_blocks() -> Iterator[tuple[str, str]]:
    yield "time_embed.0", "time_embedding.linear_1"
    yield "time_embed.2", "time_embedding.linear_2"
    yield "label_emb.0.0", "add_embedding.linear_1"
    yield "label_emb.0.2", "add_embedding.linear_2"
    yield "input_blocks.0.0", "conv_in"
    yield "input_hint_block.0", "conv_hint"
    for level in range(_LEVELS):
        first = 1 + level * (_RESNETS + 1)
        for index in range(_RESNETS):
            yield from _resnet(f"input_blocks.{first + index}.0", f"down_blocks.{level}.resnets.{index}")
            yield f"input_blocks.{first + index}.1", f"down_blocks.{level}.attentions.{index}"
        yield f"input_blocks.{first + _RESNETS}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    yield "middle_block.1", "mid_block.attentions.0"
    yield from _resnet("middle_block.2", "mid_block.resnets.1")
    for level in range(_LEVELS):
        first = level * (_RESNETS + 1)
        for index in range(_RESNETS + 1):
            yield from _resnet(f"output_blocks.{first + index}.0", f"up_blocks.{level}.resnets.{index}")
            yield f"output_blocks.{first + index}.1", f"up_blocks.{level}.attentions.{index}"
        # The upsampler stands behind the transformer where there is one: ".2" in SDXL.
        for position in (1, 2):
            yield f"output_blocks.{first + _RESNETS}.{position}.conv", f"up_blocks.{level}.upsamplers.0.conv"
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"


def _resnet(ldm: str, ours: str) -> Iterator[tuple[str, str]]:
    for ldm_layer, our_layer in _UNET_RESNET.items():
        yield f"{ldm}.{ldm_layer}", f"{ours}.{our_layer}"


# -- the connectors -------------------------------------------------------------------------------

_CONNECTOR = {"param_free_norm": "norm", "mlp_shared.0": "conv_shared"}

# -- the VAE --------------------------------------------------------------------------------------

_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
#: diffusers before 0.18 called them otherwise; such VAE files are still about.
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_VAE_MATRICES = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")


def _vae_blocks(levels: int) -> Iterator[tuple[str, str]]:
    for half in ("encoder", "decoder"):
        for index in (1, 2):
            yield from _vae_resnet(f"{half}.mid.block_{index}", f"{half}.mid_block.resnets.{index - 1}")
        for ldm, ours in _VAE_ATTENTION.items():
            yield f"{half}.mid.attn_1.{ldm}", f"{half}.mid_block.attentions.0.{ours}"
        yield f"{half}.norm_out", f"{half}.conv_norm_out"
    for level in range(levels):
        up = levels - 1 - level  # LDM counts the decoder's levels from the pixels
        for index in range(_MAX_VAE_RESNETS):
            yield from _vae_resnet(
                f"encoder.down.{level}.block.{index}", f"encoder.down_blocks.{level}.resnets.{index}"
            )
            yield from _vae_resnet(f"decoder.up.{up}.block.{index}", f"decoder.up_blocks.{level}.resnets.{index}")
        yield f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"
        yield f"decoder.up.{up}.upsample.conv", f"decoder.up_blocks.{level}.upsamplers.0.conv"


def _vae_resnet(ldm: str, ours: str) -> Iterator[tuple[str, str]]:
    yield f"{ldm}.nin_shortcut", f"{ours}.conv_shortcut"
    yield ldm, ours


# -- bigG in open_clip's names --------------------------------------------------------------------

_OPEN_CLIP = {
    "token_embedding": "embeddings.token_embedding",
    "ln_final": "final_layer_norm",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPEN_CLIP_BLOCKS = "transformer.resblocks."
_TEXT_MODEL = "text_model."

# -- tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """Pairs of module names, looked up by the longest prefix, in both directions."""

    to_ours: Mapping[str, str]
    to_ldm: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, pairs: Iterator[tuple[str, str]]) -> _Table:
        to_ours: dict[str, str] = {}
        to_ldm: dict[str, tuple[str, ...]] = {}
        for ldm, ours in pairs:
            to_ours[ldm] = ours
            to_ldm[ours] = (*to_ldm.get(ours, ()), ldm)
        return cls(to_ours, to_ldm)

    def ours(self, name: str) -> str | None:
        for prefix, rest in _splits(name):
            if prefix in self.to_ours:
                return self.to_ours[prefix] + rest
        return None

    def ldm(self, name: str) -> tuple[str, ...]:
        for prefix, rest in _splits(name):
            if prefix in self.to_ldm:
                return tuple(ldm + rest for ldm in self.to_ldm[prefix])
        return ()


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Yield (prefix, rest) at each dot, the longest prefix first."""
    end = len(name)
    while end > 0:
        yield name[:end], name[end:]
        end = name.rfind(".", 0, end)


@cache
def _unet_table() -> _Table:
    return _Table.of(_unet_blocks())


@cache
def _vae_table(levels: int) -> _Table:
    return _Table.of(_vae_blocks(levels))


# -- from files to ours ---------------------------------------------------------------------------


def unet_target(name: str, net: str = "unet") -> Target | None:
    """Return ours for a name behind `model.diffusion_model.` or `control_model.`; None if unknown."""
    ours = _unet_table().ours(name)
    return Target(f"{net}.{ours}") if ours else None


def connector_target(name: str) -> Target | None:
    """Return ours for a name behind `project_modules.`; None if unknown."""
    index, _, rest = name.partition(".")
    if not index.isdigit():
        return None
    for ldm, ours in _CONNECTOR.items():
        if rest.startswith(ldm + "."):
            rest = ours + rest[len(ldm) :]
    return Target(f"connectors.{index}.{rest}")


def vae_target(name: str, levels: int, component: str = "vae") -> Target | None:
    """Return ours for a name behind `first_stage_model.`.

    Args:
        name: "encoder.…", "decoder.…", "quant_conv.…" or "post_quant_conv.…".
        levels: of the VAE; LDM counts the decoder's levels from the other end.
        component: "vae"; or "denoise_encoder", whose `name` begins with "encoder." all the same.
    """
    if name.split(".")[0] not in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
        return None
    ours = _vae_table(levels).ours(name) or name
    part: Part = "matrix" if ours.endswith(_VAE_MATRICES) else "whole"
    full = f"vae.{ours}" if component == "vae" else f"{component}.{ours.removeprefix('encoder.')}"
    return Target(full, part)


def vae_levels(names: Iterator[str]) -> int:
    """Return how many levels a VAE has whose LDM tensor names are given, behind the prefix."""
    indices = {name.split(".")[2] for name in names if name.startswith(("encoder.down.", "decoder.up."))}
    return 1 + max((int(index) for index in indices if index.isdigit()), default=0)


def diffusers_vae_target(name: str) -> Target:
    """Return ours for a name in a diffusers `vae/` folder, of any age."""
    head, _, tail = name.rpartition(".")
    stem, _, layer = head.rpartition(".")
    if ".attentions." in name and layer in _OLD_VAE_ATTENTION:
        name = f"{stem}.{_OLD_VAE_ATTENTION[layer]}.{tail}"
    return Target(f"vae.{name}", "matrix" if name.endswith(_VAE_MATRICES) else "whole")


def clip_target(name: str, net: str) -> Target:
    """Return ours for a name of transformers' CLIP text models, with or without `text_model.`."""
    return Target(f"{net}.{name.removeprefix(_TEXT_MODEL)}")


def open_clip_targets(name: str, net: str) -> tuple[Target, ...]:
    """Return ours for a name of open_clip's text tower; a fused projection gives three."""
    if name == "positional_embedding":
        return (Target(f"{net}.embeddings.position_embedding.weight"),)
    if name == "text_projection":
        # open_clip multiplies by the matrix as stored, a Linear layer by its transpose.
        return (Target(f"{net}.text_projection.weight", "transposed"),)
    if name == "text_projection.weight":  # converters write it as a Linear layer's
        return (Target(f"{net}.text_projection.weight"),)
    head, _, leaf = name.rpartition(".")
    if head in _OPEN_CLIP:
        return (Target(f"{net}.{_OPEN_CLIP[head]}.{leaf}"),)
    if not name.startswith(_OPEN_CLIP_BLOCKS):
        return ()
    index, _, layer = name.removeprefix(_OPEN_CLIP_BLOCKS).partition(".")
    block = f"{net}.encoder.layers.{index}"
    if layer in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = layer.rpartition("_")[2]
        parts: tuple[Part, ...] = ("q", "k", "v")
        return tuple(Target(f"{block}.self_attn.{part}_proj.{kind}", part) for part in parts)
    head, _, leaf = layer.rpartition(".")
    return (Target(f"{block}.{_OPEN_CLIP_LAYER[head]}.{leaf}"),) if head in _OPEN_CLIP_LAYER else ()


# -- from ours to files ---------------------------------------------------------------------------


def unet_ldm_names(name: str) -> tuple[str, ...]:
    """Return the LDM names that a UNet tensor of ours, without its component, may have."""
    return _unet_table().ldm(name)


def ldm_name(name: str, levels: int = 4) -> str:
    """Return the name by which single files know a tensor of ours, for error messages.

    Args:
        name: ours; those of the text towers and unknown ones come back as they are.
        levels: of the VAE; 4 in SDXL.
    """
    component, _, rest = name.partition(".")
    if component == "vae":
        return "first_stage_model." + _usual(_vae_table(levels).ldm(rest), rest)
    if component == "denoise_encoder":
        inside = f"encoder.{rest}"
        encoder = _usual(_vae_table(levels).ldm(inside), inside)
        return "first_stage_model.denoise_encoder." + encoder.removeprefix("encoder.")
    if component == "unet":
        return "model.diffusion_model." + _usual(_unet_table().ldm(rest), rest)
    if component == "controlnet":
        return "model.control_model." + _usual(_unet_table().ldm(rest), rest)
    if component == "connectors":
        index, _, layer = rest.partition(".")
        for ldm, ours in _CONNECTOR.items():
            if layer.startswith(ours + "."):
                layer = ldm + layer[len(ours) :]
        return f"model.diffusion_model.project_modules.{index}.{layer}"
    return name


def _usual(names: tuple[str, ...], default: str) -> str:
    return names[-1] if names else default
