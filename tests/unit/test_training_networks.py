"""Networks to train on: loaded as they are traced, lean, and of the size that was foretold."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("peft", reason="needs the train extra")

import layouts
from golden import relative_l2

from engine.errors import CheckpointError
from engine.image.preprocess import to_network
from export.graphs.nets.unet import UNet
from export.training import memory
from export.training.adapters import add_lora, factors_of, layers_of
from export.training.dataset import Crop, Picture
from export.training.encode import LatentCache, Text, TextCache
from export.training.networks import checkpoint_blocks, load, open_base, without_control
from export.training.precision import half_products, has_bf16
from export.training.request import TrainRequest

DEVICE, CROP = torch.device("cpu"), Crop(64)
A_PICTURE = Picture(Path("a.png"), "00ff00ff00ff00ff")


@pytest.fixture(scope="module")
def opened(tiny):
    return open_base(tiny.sdxl, tiny.tokenizer)


def network(opened, precision="fp32"):
    made = load(lambda: UNet(opened.arch.unet), opened.tensors, DEVICE, prefix="unet.", precision=precision)
    torch.manual_seed(0)
    add_lora(made, layers_of(made, lambda layer: ".attn" in layer), rank=4, alpha=4.0)
    with torch.no_grad():
        for name, factor in factors_of(made).items():
            if name.endswith("B"):
                factor.normal_(std=0.02)
    return made


@pytest.fixture(scope="module")
def inputs(opened):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 16, 16), (2, 77, opened.arch.unet.context_channels), (2, opened.arch.unet.vector_channels))
    x, context, vector = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, torch.tensor([700.0, 30.0]), context, vector


def gradients(made, inputs, *, half=False):
    with half_products(DEVICE, wanted=half):
        eps = without_control(made, *inputs)
    eps.float().square().mean().backward()
    return eps.detach().float().numpy(), {name: factor.grad.numpy() for name, factor in factors_of(made).items()}


@pytest.fixture(scope="module")
def plain(opened, inputs):
    return gradients(network(opened), inputs)


def test_blocks_that_are_computed_twice_give_the_same_gradients(opened, inputs, plain):
    made = network(opened)
    checkpoint_blocks(made)
    eps, found = gradients(made, inputs)
    assert np.array_equal(eps, plain[0])
    assert all(np.array_equal(found[name], expected) for name, expected in plain[1].items())


def test_a_base_in_bf16_is_near_the_one_in_fp32(opened, inputs, plain):
    if not has_bf16(DEVICE):
        pytest.skip("cpu: does not multiply in bf16")
    made = network(opened, "bf16")
    kinds = {(parameter.ndim > 1, parameter.requires_grad, parameter.dtype) for parameter in made.parameters()}
    assert kinds == {
        (True, True, torch.float32),  # the LoRA
        (True, False, torch.bfloat16),
        (False, False, torch.float32),  # norms and biases
    }
    eps, found = gradients(made, inputs, half=True)
    assert 1e-4 < relative_l2(eps, plain[0]) < 0.03
    together = [np.concatenate([each[name].reshape(-1) for name in found]) for each in (found, plain[1])]
    assert relative_l2(*together) < 0.1


def test_activations_are_as_many_as_were_foretold(opened, inputs):
    """What autograd really keeps, counted by the same hooks on real tensors."""
    made = network(opened)
    kept = memory._Kept(made)
    with kept:
        without_control(made, *inputs)

    def make():
        unet = UNet(opened.arch.unet).requires_grad_(False)
        add_lora(unet, layers_of(unet, lambda layer: ".attn" in layer), rank=4, alpha=4.0)
        return unet

    def run(unet):
        return without_control(unet, *(torch.empty(each.shape) for each in inputs))

    need = memory.estimate(make, run, device=DEVICE, precision="fp32", checkpointing=True, average=False)
    assert need.activations == pytest.approx(kept.bytes(checkpointing=True), rel=0.02)
    assert kept.bytes(checkpointing=True) < 0.5 * kept.bytes(checkpointing=False)
    assert need.base == sum(parameter.nbytes for parameter in made.parameters() if not parameter.requires_grad)


def test_layers_are_chosen_by_what_they_are(opened):
    with torch.device("meta"):
        unet = UNet(opened.arch.unet)
    fields = {field.name: None for field in dataclasses.fields(TrainRequest) if field.default is dataclasses.MISSING}
    chosen = {
        layers: set(layers_of(unet, TrainRequest(**fields, layers=layers).wants_layer))
        for layers in ("attention", "transformer", "all")
    }
    assert chosen["attention"] < chosen["transformer"] < chosen["all"]
    ends = {layer.rpartition(".attn")[2][2:] for layer in chosen["attention"]}
    assert ends == {"to_q", "to_k", "to_v", "to_out.0"}
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= chosen["all"] - chosen["transformer"]


def test_a_base_that_lacks_a_tensor_is_refused(tiny, tmp_path):
    name = "first_stage_model.encoder.conv_out.weight"
    layouts.edit(tiny.sdxl, tmp_path / "base.safetensors", drop=[name])
    with pytest.raises(CheckpointError, match="a tensor is missing"):
        open_base(tmp_path / "base.safetensors", tiny.tokenizer)


def test_what_is_kept_on_disk_is_what_the_engine_computes(opened, tiny, restorer, tmp_path):
    """Latents against the bundle's VAE, texts against its two towers and micro-conditioning, in ONNX Runtime."""
    rgb = np.random.default_rng(0).random((64, 64, 3), np.float32)
    words = "a boat on a lake, " * 20
    texts = TextCache(opened, tmp_path, DEVICE)
    text = texts.text(words)
    (expected,) = restorer.stages.encode_texts((words,))
    assert text.tokens == len(expected.context) > 77
    assert relative_l2(text.read()["context"], expected.context) < 1e-4
    assert relative_l2(text.read()["vector"], expected.vector) < 1e-4
    sample = LatentCache(opened, Crop(64), tmp_path, DEVICE, degraded=False).sample(A_PICTURE, lambda _: rgb, text)
    z = restorer.stages.encode_clean(to_network(rgb)[None])[0]
    assert sample.shape == z.shape
    assert relative_l2(sample.read()["z"], z) < 1e-4


def test_what_is_on_disk_is_not_computed_again(opened, tmp_path):
    """Unless it is damaged, or of another picture or cut."""
    rgb = np.random.default_rng(0).random((64, 64, 3), np.float32)
    text = Text(tmp_path / "none", 77)

    def encoded(picture=A_PICTURE, crop=CROP):
        cache = LatentCache(opened, crop, tmp_path, DEVICE, degraded=False)
        return cache.sample(picture, lambda _: rgb, text).file, cache.encoded

    file, count = encoded()
    assert count == 1
    assert encoded() == (file, 0)
    assert encoded(picture=Picture(Path("renamed.png"), A_PICTURE.digest)) == (file, 0)
    content = file.read_bytes()
    file.write_bytes(content[:100])
    assert encoded() == (file, 1)
    assert file.read_bytes() == content
    assert encoded(picture=Picture(A_PICTURE.path, "11"))[1] == 1
    assert encoded(crop=Crop(64, buckets=True))[1] == 1


def test_degraded_pictures_have_latents_of_their_own(tiny, tmp_path):
    supir = open_base(tiny.sdxl, tiny.tokenizer, supir=tiny.supir)
    rgb = np.random.default_rng(0).random((64, 64, 3), np.float32)
    cache = LatentCache(supir, CROP, tmp_path, DEVICE, degraded=True)
    latents = cache.sample(A_PICTURE, lambda _: rgb, Text(tmp_path / "none", 77)).read()
    assert sorted(latents) == ["z", "z_lq_0", "z_lq_1", "z_lq_2"]
    distances = [relative_l2(latents[a], latents[b]) for a in latents for b in latents if a < b]
    assert min(distances) > 0.01
