"""The text towers: CLIP-L and OpenCLIP bigG, with parameters in transformers' names.

Sources: CLIP (arXiv 2103.00020); SPEC, "Text". Both give the hidden state before the last layer;
bigG also gives the projected state at the end token. The layers are ours, the same to the bit:
importing transformers' took a third of the time in which a build can say that a tensor is missing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.bundle.sdxl import TOKENS
from export.checkpoint.architecture import TextArch


def quick_gelu(x: Tensor) -> Tensor:
    """Return x · sigmoid(1.702 x), OpenAI's stand-in for GELU."""
    return x * torch.sigmoid(1.702 * x)


#: By the names that configurations have for them.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Embeddings(nn.Module):
    """Token and place, added."""

    def __init__(self, arch: TextArch) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(arch.vocabulary, arch.width)
        self.position_embedding = nn.Embedding(TOKENS, arch.width)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return f[B, 77, W] for i64[B, 77]."""
        return self.token_embedding(input_ids) + self.position_embedding.weight


class SelfAttention(nn.Module):
    """Attention of every token to those that a mask lets it see."""

    def __init__(self, arch: TextArch) -> None:
        super().__init__()
        self.heads = arch.heads
        self.k_proj = nn.Linear(arch.width, arch.width)
        self.v_proj = nn.Linear(arch.width, arch.width)
        self.q_proj = nn.Linear(arch.width, arch.width)
        self.out_proj = nn.Linear(arch.width, arch.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return f[B, 77, W] for f[B, 77, W] and a mask f[1, 1, 77, 77] that is added to the scores."""
        query, key, value = (
            projection(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, arch: TextArch) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[arch.activation]
        self.fc1 = nn.Linear(arch.width, arch.mlp_channels)
        self.fc2 = nn.Linear(arch.mlp_channels, arch.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return f[B, 77, W]."""
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Attention and MLP, each on normed input and added to it."""

    def __init__(self, arch: TextArch) -> None:
        super().__init__()
        self.self_attn = SelfAttention(arch)
        self.layer_norm1 = nn.LayerNorm(arch.width)
        self.mlp = Mlp(arch)
        self.layer_norm2 = nn.LayerNorm(arch.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return f[B, 77, W]."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, arch: TextArch) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(arch) for _ in range(arch.layers))


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
