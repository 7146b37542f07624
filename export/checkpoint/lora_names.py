"""What the names of a LoRA's tensors say: which layer of the base is meant, and what the tensor is to it.

A tensor's name is a layer's and an end: `lora_unet_conv_in` and `.lora_down.weight`. `_ROLES` has
all ends, `_HEADS` and `_OTHER_ENDS` what trainers and converters make of layers' names. Those are
not taken apart: `LayerNames` has all names that each layer of the base may have, and a name is
looked up. So it either means one layer of the base, or it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from export.checkpoint import keymap
from export.checkpoint.keymap import Part

# -- layers ---------------------------------------------------------------------------------------

#: What may stand before a layer's name, and the network it then belongs to. A dot or an underscore follows; dots
#: inside may be underscores too. The control trunk is none of them: LoRAs change the base.
_HEADS = {
    "lora_unet": "unet",  # kohya, LyCORIS, OneTrainer
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lycoris": "unet",  # SimpleTuner, and LyCORIS without kohya's scripts
    "unet": "unet",  # diffusers; OneTrainer with LDM names
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "clip_l": "text_encoder",  # OneTrainer
    "clip_g": "text_encoder_2",
    "diffusion_model": "unet",  # ComfyUI
    "model.diffusion_model": "unet",
    "text_encoders.clip_l.transformer": "text_encoder",
    "text_encoders.clip_g.transformer": "text_encoder_2",
    "clip_l.transformer": "text_encoder",
    "clip_g.transformer": "text_encoder_2",
}
#: A layer's last name, and what else it has been called.
_OTHER_ENDS = {
    # diffusers before 0.22, whose LoRAs were attention processors
    **{f".to_{each}": (f".processor.to_{each}_lora", f".processor.to_{each}") for each in "qkv"},
    ".to_out.0": (".processor.to_out_lora", ".processor.to_out", ".to_out"),
    **{f".self_attn.{each}_proj": (f".self_attn.to_{each}_lora",) for each in "qkv"},
    ".self_attn.out_proj": (".self_attn.to_out_lora",),
}
#: PEFT, DistributedDataParallel and torch.compile wrap modules.
_WRAPPERS = re.compile(r"^(base_model\.model\.|module\.)+|(?<![^.])_orig_mod\.")


class LayerNames:
    """The layers of a base, by every name that a LoRA may use."""

    def __init__(self, weights: Iterable[str]) -> None:
        """Take the names of the base's tensors, as `keymap` has them."""
        self.layers: dict[str, dict[str, str]] = {component: {} for component in _HEADS.values()}
        for weight in weights:
            component, _, rest = weight.partition(".")
            if component in self.layers and rest.endswith(".weight"):
                layer = rest.removesuffix(".weight")
                for name in _names(component, layer):
                    for spelled in (name, name.replace(".", "_")):
                        self.layers[component][spelled] = f"{component}.{layer}"

    def find(self, name: str) -> str | None:
        """Return the layer that a LoRA calls `name`, such as `unet.conv_in`; None if the base has none."""
        name = unwrapped(name)
        for head, component in _HEADS.items():
            for spelled in (head, head.replace(".", "_")):
                if name.startswith((f"{spelled}.", f"{spelled}_")):
                    layer = self.layers[component].get(name[len(spelled) + 1 :])
                    if layer is not None:
                        return layer
        return self.layers["unet"].get(name)  # PEFT around a bare UNet; diffusers' processors alone


def unwrapped(name: str) -> str:
    """Return a name without what PEFT and others wrap around a model."""
    return _WRAPPERS.sub("", name)


def _names(component: str, layer: str) -> Iterator[str]:
    names = [layer]
    names += keymap.unet_ldm_names(layer) if component == "unet" else [f"text_model.{layer}"]
    for name in names:
        yield name
        for end, others in _OTHER_ENDS.items():
            if name.endswith(end):
                yield from (name.removesuffix(end) + other for other in others)


# -- tensors ----------------------------------------------------------------------------------------

#: PEFT puts an adapter's name there when it is not the only one.
_ADAPTER = r"(\.\w+)?"
#: How a tensor's name ends behind its layer's, and what the tensor is.
_ROLES: tuple[tuple[str, str, Part], ...] = (
    (r"\.lora_down\.weight", "down", "whole"),  # kohya, LyCORIS, OneTrainer
    (r"\.lora_up\.weight", "up", "whole"),
    (r"\.lora_mid\.weight", "mid", "whole"),
    (rf"\.lora_A{_ADAPTER}\.weight", "down", "whole"),  # PEFT, diffusers, ComfyUI
    (rf"\.lora_B{_ADAPTER}\.weight", "up", "whole"),
    (rf"\.lora_B{_ADAPTER}\.bias", "up_bias", "whole"),
    (rf"\.lora_embedding_A{_ADAPTER}", "up", "transposed"),  # an embedding's weight is a Linear layer's transposed
    (rf"\.lora_embedding_B{_ADAPTER}", "down", "transposed"),
    (r"\.(lora|lora_linear_layer)\.down\.weight", "down", "whole"),  # diffusers before PEFT
    (r"\.(lora|lora_linear_layer)\.up\.weight", "up", "whole"),
    (r"(?<=_lora)\.down\.weight", "down", "whole"),  # diffusers' attention processors
    (r"(?<=_lora)\.up\.weight", "up", "whole"),
    *((rf"\.hada_{each}{_ADAPTER}", f"hada_{each}", "whole") for each in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(
        (rf"\.lokr_{each}{_ADAPTER}", f"lokr_{each}", "whole")
        for each in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    ),
    (r"\.(diff|w_norm)", "diff", "whole"),
    (r"\.(diff_b|b_norm)", "diff_b", "whole"),
    (r"\.alpha", "alpha", "whole"),
    (r"\.dora_scale", "dora_scale", "whole"),  # LyCORIS, OneTrainer: of the outputs or of the inputs
    (rf"\.lora_magnitude_vector{_ADAPTER}(\.weight)?", "magnitude", "whole"),  # PEFT: always of the outputs
)
_NAMES = tuple((re.compile(rf"(?P<layer>.+?){end}"), role, part) for end, role, part in _ROLES)

#: Embeddings of words, which trainers put beside the pairs. No restoration uses their words.
_EMBEDDINGS = re.compile(r"bundle_emb\..+|clip_[lg]|text_encoders_[01]|emb_params|string_to_param.*")

#: Kinds that change a model in another way than by adding to its weights, or that nobody has checked here.
_REFUSED = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("OFT or BOFT", r"\.(oft_|boft_)"),
        ("GLoRA", r"\.(a1|a2|b1|b2|bm)\.weight$"),
        ("IA3", r"\.(on_input$|ia3_)"),
        ("T-LoRA", r"\.([qp]_layer\.weight|lambda_layer)$"),
        ("AdaLoRA", r"\.lora_E\b"),
        ("VeRA", r"vera_"),
        ("FourierFT", r"fourierft_"),
        ("custom diffusion", r"_custom_diffusion\."),
        ("an IP-Adapter", r"\.to_[kv]_ip\.|^image_proj\."),
        ("whole weights beside the pairs (PEFT's modules_to_save)", r"\.modules_to_save\.|\.set_weight$"),
        ("whole biases beside the pairs (PEFT's bias)", r"\.base_layer\.bias$"),
        ("weights of another shape (ComfyUI's reshape_weight)", r"\.reshape_weight$"),
    )
)


def role_of(tensor: str) -> tuple[str, str, Part] | None:
    """Return the layer, the role and the part that a tensor's name tells; None if it is no part of a LoRA."""
    for pattern, role, part in _NAMES:
        match = pattern.fullmatch(tensor)
        if match:
            return match["layer"], role, part
    return None


def is_embedding(tensor: str) -> bool:
    """Tell whether a tensor is a word's embedding beside a LoRA."""
    return _EMBEDDINGS.fullmatch(tensor) is not None


def refused_kind(tensor: str) -> str | None:
    """Return the unsupported kind of LoRA that a tensor belongs to, by its name; None if it is supported."""
    return next((kind for kind, pattern in _REFUSED if pattern.search(tensor)), None)
