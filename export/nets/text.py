"""The text towers: CLIP-L and OpenCLIP bigG, from transformers' encoder layers.

Sources: CLIP (arXiv 2103.00020); SPEC, "Text". Both give the hidden state before the last layer;
bigG also gives the projected state at the end token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from export.architecture import TOKENS, TextArch


class Embeddings(nn.Module):
    """Token and place, added."""

    def __init__(self, arch: TextArch) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(arch.vocabulary, arch.width)
        self.position_embedding = nn.Embedding(TOKENS, arch.width)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return f[B, 77, W] for i64[B, 77]."""
        return self.token_embedding(input_ids) + self.position_embedding.weight


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, arch: TextArch) -> None:
        super().__init__()
        config = CLIPTextConfig(
            hidden_size=arch.width,
            intermediate_size=arch.mlp_channels,
            num_hidden_layers=arch.layers,
            num_attention_heads=arch.heads,
            hidden_act=arch.activation,
            attn_implementation="sdpa",
        )
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(arch.layers))


class TextTower(nn.Module):
    """A CLIP text model in transformers' names."""

    def __init__(self, arch: TextArch) -> None:
        super().__init__()
        self.embeddings = Embeddings(arch)
        self.encoder = Encoder(arch)
        self.final_layer_norm = nn.LayerNorm(arch.width)
        if arch.projected:
            self.text_projection = nn.Linear(arch.width, arch.width, bias=False)
        # Only the causal mask: padding is seen, as it was in training.
        mask = torch.full((TOKENS, TOKENS), float("-inf"), device="cpu").triu(1)
        self.register_buffer("causal_mask", mask[None, None], persistent=False)

    def penultimate(self, input_ids: Tensor) -> Tensor:
        """Return the hidden state before the last layer, f[B, 77, W]."""
        hidden = self.embeddings(input_ids)
        for layer in self.encoder.layers[:-1]:
            hidden = self._run(layer, hidden)
        return hidden

    def pooled(self, hidden: Tensor, input_ids: Tensor, end_id: int) -> Tensor:
        """Return f[B, W]: the last layer's state at the first end token, normed and projected."""
        final = self.final_layer_norm(self._run(self.encoder.layers[-1], hidden))
        first_end = (input_ids == end_id).to(torch.int64).argmax(dim=1)
        at_end = final.gather(1, first_end[:, None, None].expand(-1, 1, final.shape[2]))
        return self.text_projection(at_end[:, 0])

    def _run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        return layer(hidden, self.causal_mask.to(hidden.dtype))


class TextEncoderGraph(nn.Module):
    """The graph `text_encoder`: CLIP-L."""

    def __init__(self, arch: TextArch) -> None:
        super().__init__()
        self.text_encoder = TextTower(arch)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return `hidden` f[B, 77, W] for i64[B, 77]."""
        return self.text_encoder.penultimate(input_ids)


class TextEncoder2Graph(nn.Module):
    """The graph `text_encoder_2`: OpenCLIP bigG.

    Args:
        end_id: the vocabulary's end token, whose first place is pooled.
    """

    def __init__(self, arch: TextArch, end_id: int) -> None:
        super().__init__()
        self.end_id = end_id
        self.text_encoder_2 = TextTower(arch)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return `hidden` f[B, 77, W] and `pooled` f[B, W] for i64[B, 77]."""
        hidden = self.text_encoder_2.penultimate(input_ids)
        return hidden, self.text_encoder_2.pooled(hidden, input_ids, self.end_id)
