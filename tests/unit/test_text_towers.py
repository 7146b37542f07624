"""The text towers' layers against transformers', which nothing of a build imports."""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from engine.bundle.sdxl import TOKENS
from export.checkpoint.architecture import TextArch
from export.graphs.nets.text import Layer


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_layer_is_transformers_to_the_bit(activation):
    from transformers import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    arch = TextArch(128, 2, 512, 1000, activation, projected=False)
    config = CLIPTextConfig(
        hidden_size=arch.width,
        intermediate_size=arch.mlp_channels,
        num_attention_heads=arch.heads,
        hidden_act=activation,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    ours, theirs = Layer(arch), CLIPEncoderLayer(config)
    theirs.load_state_dict(ours.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    x = torch.randn(2, TOKENS, arch.width)
    mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]
    with torch.inference_mode():
        found = ours(x, mask)
        assert torch.equal(found, theirs(x, mask))
        assert not torch.equal(found, ours(x, torch.zeros_like(mask)))


def test_what_is_planned_needs_no_transformers():
    """Its import was a third of the time in which a missing tensor is named."""
    program = "import sys; import export.build.build_plan; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
