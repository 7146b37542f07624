from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the export extra")

from layouts import our_shapes

from engine.errors import CheckpointError
from export.checkpoint.architecture import Architecture, TextArch, UNetArch, VaeArch, infer_architecture
from export.graphs.builder import graph_builders

DATA = Path(__file__).parent.parent / "data"
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def tiny():
    return our_shapes(DATA / "reference" / "tiny_manifest.json")


@pytest.fixture(scope="module")
def full():
    return our_shapes(DATA / "full_manifest.json")


def test_sdxl_is_read_off_its_shapes(full):
    unet = UNetArch(4, (320, 640, 1280), (0, 2, 10), 10, 2048, 2816)
    assert infer_architecture(full) == Architecture(
        unet=unet,
        controlnet=unet,
        vae=VaeArch((128, 256, 512, 512), 4),
        text_encoder=TextArch(768, 12, 3072, 49408, "quick_gelu", projected=False),
        text_encoder_2=TextArch(1280, 32, 5120, 49408, "gelu", projected=True),
    )


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_modules_hold_exactly_the_tensors_of_the_files(size, request):
    shapes = request.getfixturevalue(size)
    held = {}
    for builder in graph_builders(infer_architecture(shapes), "fp16", 49407).values():
        held |= builder.parameters
    assert held == shapes


def test_parameter_count_of_the_real_size(full):
    # SPEC: UNet 2.57 B, ControlNet 1.24 B, connectors 54.8 M, text 0.82 B.
    import math

    def count(net):
        return sum(math.prod(shape) for name, shape in full.items() if name.split(".")[0] == net)

    assert count("unet") == pytest.approx(2.57e9, rel=2e-3)
    assert count("controlnet") == pytest.approx(1.24e9, rel=1e-2)
    assert count("connectors") == pytest.approx(54.8e6, rel=1e-3)
    assert count("text_encoder") + count("text_encoder_2") == pytest.approx(0.82e9, rel=5e-3)


def test_other_widths_depths_and_vaes_are_read_too(tiny):
    """A VAE of three levels and eight latent channels, and another depth: nothing is assumed."""
    shapes = {name: shape for name, shape in tiny.items() if ".down_blocks.3." not in name}
    for name in ("vae.decoder.conv_in.weight", "unet.conv_in.weight", "controlnet.conv_in.weight"):
        shapes[name] = (shapes[name][0], 8, 3, 3)
    shapes = {
        name: shape for name, shape in shapes.items() if "mid_block.attentions.0.transformer_blocks.1." not in name
    }
    arch = infer_architecture(shapes)
    assert arch.vae == VaeArch((32, 64, 128), 8)
    assert arch.vae.pixels_per_cell == 4
    assert (arch.unet.latent_channels, arch.unet.middle_depth) == (8, 1)


@pytest.mark.parametrize(("left", "channels"), [(6 * 256, 256), (6 * 32, 32), (12, 2)])
def test_the_width_of_the_sinusoids_is_read_too(tiny, left, channels):
    pooled = tiny["text_encoder_2.text_projection.weight"][0]
    vector = {
        f"{net}.add_embedding.linear_1.weight": (tiny[f"{net}.add_embedding.linear_1.weight"][0], pooled + left)
        for net in ("unet", "controlnet")
    }
    assert infer_architecture({**tiny, **vector}).sinusoid_channels == channels


@pytest.mark.parametrize("left", [0, 6, 6 * 256 + 1, 5 * 256])
def test_a_vector_that_sinusoids_do_not_fill_is_told(tiny, left):
    """5 × 256 is SDXL's refiner, whose micro-conditioning is another."""
    pooled = tiny["text_encoder_2.text_projection.weight"][0]
    name = "unet.add_embedding.linear_1.weight"
    with pytest.raises(CheckpointError, match="(?s)vector width.*do not belong together"):
        infer_architecture({**tiny, name: (tiny[name][0], pooled + left)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet.conv_in.weight": None}, r"model\.diffusion_model\.input_blocks\.0\.0\.weight: a tensor is missing"),
        (
            {"controlnet.add_embedding.linear_1.weight": None},
            r"(?s)model\.control_model\.label_emb\.0\.0\.weight: a tensor is missing.*--supir",
        ),
        ({"unet.conv_in.weight": (32, 4)}, "wrong shape"),
        ({"unet.down_blocks.0.resnets.0.conv1.weight": (64, 32, 3, 3)}, "first level must keep its width"),
        ({"text_encoder.embeddings.token_embedding.weight": (49408, 128)}, "do not belong together"),
        ({"vae.decoder.conv_in.weight": (128, 16, 3, 3)}, "do not belong together"),
        ({"controlnet.down_blocks.2.resnets.0.conv1.weight": (192, 64, 3, 3)}, "do not belong together"),
        ({"text_encoder.embeddings.token_embedding.weight": (49408, 65)}, "does not divide into heads"),
        ({"unet.down_blocks.2.resnets.0.conv1.weight": (96, 64, 3, 3)}, "does not divide into heads"),
        (
            {
                "unet.conv_in.weight": (40, 4, 3, 3),
                "unet.down_blocks.0.resnets.0.conv1.weight": (40, 40, 3, 3),
            },
            "does not divide into groups of its norms",
        ),
        ({"vae.encoder.down_blocks.0.resnets.0.conv1.weight": (40, 40, 3, 3)}, "groups of its norms"),
    ],
)
def test_what_contradicts_itself_is_told(tiny, change, message):
    shapes = {name: shape for name, shape in {**tiny, **change}.items() if shape is not None}
    with pytest.raises(CheckpointError, match=message):
        infer_architecture(shapes)


def test_another_structure_is_told(tiny):
    shapes = {**tiny, "unet.down_blocks.3.resnets.0.conv1.weight": (128, 128, 3, 3)}
    with pytest.raises(CheckpointError, match="(?s)another structure than SDXL's.*4 levels"):
        infer_architecture(shapes)
