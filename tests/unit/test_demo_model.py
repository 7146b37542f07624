"""The demo's networks: where they start, and their files in real layouts."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("scipy", reason="needs the train extra")

from safetensors.torch import load_file

from engine.settings import NEGATIVE_WORDS, QUALITY_WORDS
from export.checkpoint.architecture import infer_architecture
from export.checkpoint.checkpoint import open_sdxl, open_supir
from export.checkpoint.tokenizer import END_TOKEN
from export.demo.data import Pairs, Window
from export.demo.model import (
    LATENT_CHANNELS,
    SDXL_FILE,
    SUPIR_FILE,
    DemoModel,
    demo_architecture,
    load_checkpoints,
    patch_code,
    save_checkpoints,
)
from export.demo.patches import pixel_weights
from export.demo.pictures import make_picture
from export.demo.words import demo_tokenizer, learn_tokenizer, token_rows


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tokenizer = demo_tokenizer()
    made = DemoModel(demo_architecture(tokenizer.get_vocab_size()), tokenizer.token_to_id(END_TOKEN))
    made.start_autoencoder(0)
    made.start_denoise_encoder()
    made.start_unet()
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def pixels():
    pictures = np.stack([make_picture("leaves", 9, index, 128).rgb for index in range(2)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def patches(pixels):
    batch, colours, height, width = pixels.shape
    split = pixels.reshape(batch, colours, height // 8, 8, width // 8, 8)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, height // 8, width // 8, -1).double().numpy()


def test_the_encoder_starts_as_the_patches_principal_components(model, pixels):
    code = patch_code(0)
    expected = (patches(pixels) - code.mean) @ code.basis * code.gain
    for encode in (model.encode, model.encode_degraded):
        found = encode(pixels).permute(0, 2, 3, 1).numpy()
        assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


def test_the_decoder_starts_with_each_patchs_colour(model, pixels):
    decoded = patches(model.decode(model.encode(pixels))).reshape(2, 16, 16, 64, 3)
    means = patches(pixels).reshape(2, 16, 16, 64, 3).mean(axis=3, keepdims=True)
    assert np.abs(decoded - means).max() < 0.15
    assert np.abs(decoded - means).mean() < 0.02


def test_the_code_is_a_convolution(model, pixels):
    """What training uses in place of the encoder, and what a level of 32 channels lets through."""
    weight, bias = patch_code(0).kernel()
    found = torch.nn.functional.conv2d(pixels, weight, bias, stride=8)
    assert float((found - model.encode(pixels)).norm() / found.norm()) < 0.03
    basis = patch_code(0).basis
    assert np.abs(basis.T @ basis - np.eye(LATENT_CHANNELS)).max() < 1e-9


def test_errors_of_the_latent_are_known_in_pixels(model, pixels):
    """To what the code leaves out: an error of z costs what it changes in the picture."""
    code = patch_code(0)
    z = model.encode(pixels)
    error = 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    in_pixels = (error.permute(0, 2, 3, 1).double().numpy() / code.gain) @ code.basis.T
    found = (error.square() * pixel_weights(code)).sum(dim=1).mean()
    assert float(found) == pytest.approx((in_pixels**2).mean(), rel=1e-4)


def test_the_latent_has_about_unit_deviation(model):
    pictures = np.stack([make_picture("leaves", 0, index, 128).rgb for index in range(100, 124)])
    z = model.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert z.shape[1] == LATENT_CHANNELS
    assert 0.7 < float(z.std()) < 1.4


def test_without_training_noise_passes_through_and_control_changes_nothing(model):
    """At each noise level, up to the scale of each channel, which the last norm takes away."""
    x = torch.randn(2, LATENT_CHANNELS, 32, 32, generator=torch.Generator().manual_seed(1))
    ids = torch.full((2, 77), model.end_id)
    context, vector = model.read(ids, ids)
    assert context.shape == (2, 77, 128)
    time = torch.tensor([900.0, 10.0])
    found = model.prior(x, time, context, vector)
    assert torch.allclose(found, x / x.square().mean(dim=(2, 3), keepdim=True).sqrt(), atol=1e-3)
    assert float((found - x).norm() / x.norm()) < 0.05
    model.start_control(x, time, context, vector)
    steered = model.steered(x, time, torch.randn_like(x), context, vector)
    assert float((steered - found).norm() / found.norm()) < 0.01


def test_a_linear_layer_tells_the_degraded_latent_from_the_noisy_one(model):
    """Of the ControlNet's first feature: each pair's sum is the degraded photo's latent."""
    model.start_control(*_any_input(model))
    x, lq = torch.randn(2, 1, LATENT_CHANNELS, 8, 8).unbind(0)
    first = model.controlnet.conv_in(x) + model.controlnet.conv_hint(lq)
    pairs = first[:, : 2 * LATENT_CHANNELS].unflatten(1, (-1, 2))
    assert torch.allclose(pairs.sum(dim=2), lq, atol=1e-5)
    assert torch.allclose(pairs[:, :, 0], x, atol=1e-5)


def _any_input(model):
    ids = torch.full((1, 77), model.end_id)
    return torch.randn(1, LATENT_CHANNELS, 16, 16), torch.tensor([500.0]), *model.read(ids, ids)


def test_files_are_read_back_as_real_checkpoints(model, tmp_path):
    save_checkpoints(model.state_dict(), model.arch, tmp_path)
    sdxl, supir = open_sdxl(tmp_path / SDXL_FILE), open_supir(tmp_path / SUPIR_FILE)
    assert not sdxl.ignored
    assert not supir.ignored
    shapes = {name: tensor.shape for name, tensor in {**sdxl.tensors, **supir.tensors}.items()}
    assert infer_architecture(shapes) == model.arch
    again = DemoModel(model.arch, model.end_id)
    load_checkpoints(again, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(torch.float16).float()), name
    names = set(load_file(tmp_path / SDXL_FILE))
    assert "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight" in names
    # Right behind the block, as LDM counts where there is no transformer.
    assert "model.diffusion_model.output_blocks.2.1.conv.weight" in names


def test_the_quality_words_fit_into_one_chunk():
    tokenizer = demo_tokenizer()
    ids, ids_2 = token_rows(tokenizer, [QUALITY_WORDS, NEGATIVE_WORDS, ""])
    end = tokenizer.token_to_id(END_TOKEN)
    assert ids.shape == ids_2.shape == (3, 77)
    assert (ids[:, -1] == end).all()
    assert (ids_2[:, -1] == 0).all()
    assert not torch.equal(ids[0], ids[1])
    assert tokenizer.get_vocab_size() == end + 1


def test_the_vocabulary_is_kept_and_can_be_learned_again():
    """With tokens of the same number and for the same words, which other runs may number otherwise."""
    kept, learned = demo_tokenizer(), learn_tokenizer()
    assert kept.get_vocab_size() == learned.get_vocab_size()
    for tokenizer in (kept, learned):
        for word in ("landscape", "portrait", "photograph", "green"):
            assert len(tokenizer.encode(word, add_special_tokens=False).ids) == 1
        said = tokenizer.decode(tokenizer.encode("naïve 写真, of shapes").ids).replace("</w>", " ")
        assert said.split() == ["naïve", "写真", ",", "of", "shapes"]


def test_pairs_follow_from_their_number():
    pairs = Pairs(("leaves",), 0)
    first, again = pairs[3], pairs[3]
    assert first.clean.shape == first.degraded.shape == (256, 256, 3)
    assert np.array_equal(first.degraded, again.degraded)
    assert not np.array_equal(first.clean, first.degraded)


@pytest.mark.parametrize("per_step", [0.25, 1.0, 3.0])
def test_a_window_is_the_same_after_a_stop(per_step):
    def stream(start):
        return iter(range(start, 10_000))

    whole = Window(stream, 16, per_step, 0)
    drawn = [whole.draw(np.random.default_rng(step), 4) for step in range(30)]
    resumed = Window(stream, 16, per_step, 12)
    assert [resumed.draw(np.random.default_rng(step), 4) for step in range(12, 30)] == drawn[12:]
    assert max(drawn[-1]) <= 16 + 30 * per_step
    assert min(drawn[-1]) >= 28 * per_step - 1
