"""The demo's networks: the real system's modules at a size that a laptop runs, and their files.

The parameters' names are the bundle's (`keymap`), the files' those of real checkpoints, so what is
trained here is read back through the same code as SDXL and SUPIR.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.bundle.sdxl import MICRO_CONDITIONS
from engine.pipeline.text import sinusoids
from export.checkpoint import keymap
from export.checkpoint.architecture import LATENT_SCALE, Architecture, TextArch, UNetArch, VaeArch, sinusoid_frequencies
from export.demo import passthrough
from export.demo.patches import PatchCode, learn_patch_code, start_decoder, start_encoder, start_quantizers
from export.demo.pictures import make_picture
from export.graphs.nets.connectors import Connectors, ZeroCrossAttn, ZeroSFT
from export.graphs.nets.text import TextTower
from export.graphs.nets.unet import ControlNet, UNet
from export.graphs.nets.vae import Encoder, VaeModules
from export.training.networks import without_control

LATENT_CHANNELS = 24
TEXT_WIDTH = 64
#: Of each number of micro-conditioning, which is the same for every picture here; SDXL has 256.
SINUSOID_CHANNELS = 32
_VAE_CHANNELS = (96, 32, 32, 96)
_CODE_PICTURES = 64


def demo_architecture(vocabulary: int) -> Architecture:
    """Return the demo's sizes: a few million parameters in the real structure.

    A latent of 24 channels instead of SDXL's 4, because at 256 × 256 pixels that one is what limits
    the result. The autoencoder's ends have 96 channels, so that its last norms have groups of three
    (see `patches`), and the UNet's 64 are pairs (see `passthrough`).
    """
    unet = UNetArch(
        latent_channels=LATENT_CHANNELS,
        channels=(64, 64, 64),
        depths=(0, 0, 0),
        middle_depth=1,
        context_channels=2 * TEXT_WIDTH,
        vector_channels=TEXT_WIDTH + len(MICRO_CONDITIONS) * SINUSOID_CHANNELS,
    )
    text, text_2 = (
        TextArch(TEXT_WIDTH, 2, 2 * TEXT_WIDTH, vocabulary, activation, projected)
        for activation, projected in (("quick_gelu", False), ("gelu", True))
    )
    return Architecture(unet, unet, VaeArch(_VAE_CHANNELS, LATENT_CHANNELS), text, text_2)


class DemoModel(nn.Module):
    """All networks of the system, trainable; see `export.graphs.nets` for each one's shapes."""

    micro: Tensor

    def __init__(self, arch: Architecture, end_id: int) -> None:
        super().__init__()
        self.arch, self.end_id = arch, end_id
        self.text_encoder = TextTower(arch.text_encoder)
        self.text_encoder_2 = TextTower(arch.text_encoder_2)
        self.vae = VaeModules(arch.vae, encoder=True, decoder=True, quant=True)
        self.denoise_encoder = Encoder(arch.vae)
        self.unet = UNet(arch.unet)
        self.controlnet = ControlNet(arch.controlnet)
        self.connectors = Connectors(arch.unet)
        self.register_buffer(
            "micro",
            torch.from_numpy(sinusoids(MICRO_CONDITIONS, sinusoid_frequencies(SINUSOID_CHANNELS))),
            persistent=False,
        )
        self._initialise()

    def _initialise(self) -> None:
        """Let every residual branch start at nothing, so that deep stacks train from the first step."""
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                _zero(module.conv2)
            elif isinstance(module, Attention):
                _zero(module.to_out[0])
            elif isinstance(module, BasicTransformerBlock):
                _zero(module.ff.net[-1])
            elif isinstance(module, ZeroSFT):
                for layer in (module.zero_mul, module.zero_add, module.zero_conv):
                    _zero(layer)
            elif isinstance(module, ZeroCrossAttn):
                _zero(module.attn.to_out[0])
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def start_autoencoder(self, seed: int) -> None:
        """Begin the autoencoder as a linear code of the pictures' patches."""
        code = patch_code(seed)
        start_encoder(self.vae.encoder, code)
        start_quantizers(self.vae.quant_conv, self.vae.post_quant_conv)
        start_decoder(self.vae.decoder, code)

    def start_denoise_encoder(self) -> None:
        """Begin the denoise encoder as a copy of the VAE's encoder."""
        self.denoise_encoder.load_state_dict(copy.deepcopy(self.vae.encoder.state_dict()))

    def start_unet(self) -> None:
        """Let the base UNet begin as the identity."""
        passthrough.start_unet(self.unet)

    def start_control(self, x: Tensor, timestep: Tensor, context: Tensor, vector: Tensor) -> None:
        """Begin the ControlNet as a copy, and the connectors as plain skip connections on average.

        Args:
            x, timestep, context, vector: a batch to average over, as for `prior`.
        """
        passthrough.start_controlnet(self.controlnet, self.unet)
        with torch.no_grad():
            self.unet(x, timestep, context, vector, (None,) * 10, None, passthrough.NormStart(self.connectors))

    def encode(self, pixels: Tensor) -> Tensor:
        """Return z f[B, C, h, w] for f[B, 3, 8h, 8w] in [-1, 1], as the graph `vae_encoder`."""
        return self.vae.scaled_mode(self.vae.encoder(pixels))

    def encode_degraded(self, pixels: Tensor) -> Tensor:
        """Return z f[B, C, h, w], as the graph `denoise_encoder`."""
        return self.vae.scaled_mode(self.denoise_encoder(pixels))

    def decode(self, z: Tensor) -> Tensor:
        """Return pixels f[B, 3, 8h, 8w], as the graph `vae_decoder`."""
        return self.vae.decoder(self.vae.post_quant_conv(z / LATENT_SCALE))

    def read(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Return context f[B, 77, C] and vector f[B, V] for the two towers' tokens i64[B, 77]."""
        hidden = self.text_encoder.penultimate(ids)
        hidden_2 = self.text_encoder_2.penultimate(ids_2)
        pooled = self.text_encoder_2.pooled(hidden_2, ids_2, self.end_id)
        vector = torch.cat([pooled, self.micro.expand(len(pooled), -1)], dim=1)
        return torch.cat([hidden, hidden_2], dim=2), vector

    def prior(self, x: Tensor, timestep: Tensor, context: Tensor, vector: Tensor) -> Tensor:
        """Return the base UNet's noise estimate, without control; arguments as `UNet.forward`."""
        return without_control(self.unet, x, timestep, context, vector)

    def steered(
        self, x: Tensor, timestep: Tensor, lq: Tensor, context: Tensor, vector: Tensor, *, scale: float = 1.0
    ) -> Tensor:
        """Return the noise estimate under control of a scale."""
        controls = self.controlnet(x, timestep, lq, context, vector)
        strength = torch.full((1,), scale, device=x.device)
        return self.unet(x, timestep, context, vector, controls, strength, self.connectors)


@cache
def patch_code(seed: int) -> PatchCode:
    """Return the code of the demo's latent, learned from pictures of the training's seed."""
    pictures = [make_picture("leaves", seed, index, 256).rgb for index in range(_CODE_PICTURES)]
    return learn_patch_code(np.stack(pictures), LATENT_CHANNELS, _VAE_CHANNELS[1])


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


# -- files ----------------------------------------------------------------------------------------

SDXL_FILE, SUPIR_FILE = "sdxl.safetensors", "supir.safetensors"


def save_checkpoints(state: Mapping[str, Tensor], arch: Architecture, folder: Path) -> None:
    """Write an SDXL-layout and a SUPIR-layout file, in fp16.

    Args:
        state: every parameter, by our names.
        arch: of the networks. folder: that is there.
    """
    sdxl: dict[str, Tensor] = {}
    supir: dict[str, Tensor] = {}
    for name, tensor in ldm_tensors(state, arch):
        is_supir = ".control_model." in name or ".project_modules." in name or ".denoise_encoder." in name
        (supir if is_supir else sdxl)[name] = tensor.to(torch.float16).contiguous().clone()
    save_file(sdxl, folder / SDXL_FILE)
    save_file(supir, folder / SUPIR_FILE)


def ldm_tensors(state: Mapping[str, Tensor], arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under the name and in the shape that single-file checkpoints have.

    Args:
        state: by our names.
        arch: of the networks.
    """
    levels = len(arch.vae.channels)
    for name, tensor in state.items():
        component, _, rest = name.partition(".")
        if component == "text_encoder":
            yield f"conditioner.embedders.0.transformer.text_model.{rest}", tensor
        elif component == "text_encoder_2":
            continue  # below, where projections are fused
        elif component == "unet" and ".upsamplers." in rest:
            level = int(rest.split(".")[1])
            deep = arch.unet.depths[len(arch.unet.channels) - 1 - level] > 0
            yield "model.diffusion_model." + keymap.unet_ldm_names(rest)[deep], tensor
        else:
            matrix = component in ("vae", "denoise_encoder") and ".attentions." in name and tensor.ndim == 2
            yield keymap.ldm_name(name, levels), tensor[:, :, None, None] if matrix else tensor
    yield from _open_clip_tensors(state, arch.text_encoder_2.layers)


def _open_clip_tensors(state: Mapping[str, Tensor], layers: int) -> Iterator[tuple[str, Tensor]]:
    heads = ["positional_embedding", "text_projection", "token_embedding.weight", "ln_final.weight", "ln_final.bias"]
    for index in range(layers):
        block = f"transformer.resblocks.{index}"
        heads += [f"{block}.attn.in_proj_weight", f"{block}.attn.in_proj_bias"]
        for layer in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"):
            heads += [f"{block}.{layer}.weight", f"{block}.{layer}.bias"]
    for name in heads:
        targets = keymap.open_clip_targets(name, "text_encoder_2")
        parts = [state[target.name] for target in targets]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        yield f"conditioner.embedders.1.model.{name}", joined.T if targets[0].part == "transposed" else joined


def load_checkpoints(model: DemoModel, folder: Path) -> None:
    """Read what `save_checkpoints` wrote, through the reader of real checkpoints."""
    from export.checkpoint.checkpoint import open_sdxl, open_supir

    state: dict[str, Tensor] = {}
    for checkpoint in (open_sdxl(folder / SDXL_FILE), open_supir(folder / SUPIR_FILE)):
        for name, tensor in checkpoint.tensors.items():
            state[name] = torch.from_numpy(tensor.read().astype(np.float32))
    model.load_state_dict(state)
