"""Training LoRAs, part by part: the loop, the objective, pictures, memory, files."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("peft", reason="needs the train extra")

from PIL import Image
from safetensors.numpy import save_file

from engine.cli.captions import Caption, CaptionError, Sidecar
from engine.errors import ImageError
from engine.sampling.schedule import train_sigmas
from export.checkpoint.architecture import VaeArch
from export.checkpoint.lora_names import LayerNames
from export.training import memory
from export.training.adapters import activate, add_lora, factors_of, layers_of, squared_norm
from export.training.curves import draw_losses
from export.training.dataset import Crop, Picture, caption_of, find_pictures, load_cut, require_captions, split
from export.training.encode import Sample, Text
from export.training.loop import Recipe, Trainer, TrainingError, constant_after_warm_up
from export.training.lora_file import kohya_name, write_lora
from export.training.objective import HELD_OUT_LEVELS, Objective

SHAPE = (4, 8, 8)
DEVICE = torch.device("cpu")

# -- the objective ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Five pictures, the last one of another shape and with a longer caption."""
    folder, rng, made = tmp_path_factory.mktemp("samples"), np.random.default_rng(0), []
    for index in range(5):
        shape, tokens = ((4, 8, 16), 154) if index == 4 else (SHAPE, 77)
        file, text = folder / f"{index}.safetensors", folder / f"text-{index}.safetensors"
        lq = {f"z_lq_{kind}": np.full(shape, kind, np.float32) for kind in range(3)}
        save_file({"z": rng.standard_normal(shape, np.float32), **lq}, file)
        context = np.full((tokens, 6), index, np.float32)
        save_file({"context": context, "vector": np.full(5, index, np.float32)}, text)
        made.append(Sample(Picture(Path(f"{index}.png"), str(index)), file, shape, Text(text, tokens)))
    return made


def objective(samples, network, **changes):
    options = {"batch": 4, "seed": 3, "no_text_share": 0.0, **changes}
    no_text = options.pop("no_text", samples[0].text)
    held_out = options.pop("held_out", samples[:2])
    return Objective(network, options.pop("factors", []), samples, held_out, no_text, DEVICE, **options)


def latent_of(samples, vector):
    return [torch.from_numpy(samples[int(index)].read()["z"]) for index in vector[:, 0]]


def test_a_network_that_finds_the_noise_has_no_loss(samples):
    """And what it is given is the latent noised to the level that it is told, at unit variance."""
    told = []

    def knowing(x, timestep, lq, context, vector):
        assert lq is None
        sigma = torch.from_numpy(train_sigmas()[timestep.long().numpy()].astype(np.float32))[:, None, None, None]
        told.extend(timestep.tolist())
        return (x * torch.sqrt(sigma**2 + 1) - torch.stack(latent_of(samples, vector))) / sigma

    tried = objective(samples, knowing)
    losses = [sum(float(part["noise"]) for part in tried.losses_at(step)) for step in range(30)]
    assert max(losses) < 1e-3
    assert tried.held_out_loss() < 1e-3
    levels = np.array(told[: 30 * 4])
    assert levels.min() < 60
    assert levels.max() > 940
    assert 400 < levels.mean() < 600


def test_a_network_that_finds_nothing_has_the_noises_variance(samples):
    tried = objective(samples, lambda x, *_: torch.zeros_like(x), batch=64)
    assert sum(float(part["noise"]) for part in tried.losses_at(0)) == pytest.approx(1.0, abs=0.03)


def test_how_many_go_together_changes_nothing(samples):
    """Shapes and contexts of different lengths cannot go together, whatever is asked for."""
    sizes = []

    def network(x, timestep, lq, context, vector):
        sizes.append(len(x))
        return x * (1 + vector[:, 0] - timestep / 500)[:, None, None, None]

    losses = [
        sum(float(part["noise"]) for part in objective(samples, network, batch=20, at_once=at_once).losses_at(7))
        for at_once in (1, 3, 20)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert sizes[:20] == [1] * 20
    assert sizes[-2:] == [16, 4]


def test_every_picture_is_seen_once_an_epoch_in_an_order_of_its_own(samples):
    seen = []

    def network(x, timestep, lq, context, vector):
        seen.extend(vector[:, 0].tolist())
        return x

    tried = objective(samples, network, batch=1)
    for step in range(15):
        list(tried.losses_at(step))
    epochs = [seen[start : start + 5] for start in (0, 5, 10)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_share_comes_without_words(samples):
    """But never those that judge."""
    words = []

    def network(x, timestep, lq, context, vector):
        words.extend(context[:, 0, 0].tolist())
        return x

    tried = objective(samples[1:4], network, no_text=samples[0].text, no_text_share=0.3, batch=200)
    list(tried.losses_at(0))
    assert 35 < words.count(0) < 85
    del words[:]
    tried.held_out_loss()
    assert words.count(0) == 0
    assert len(words) == 2 * HELD_OUT_LEVELS


def test_under_control_it_sees_all_degradations(samples):
    seen = set()

    def network(x, timestep, lq, context, vector):
        seen.update(lq[:, 0, 0, 0].tolist())
        return x

    list(objective(samples, network, batch=40, controlled=True).losses_at(0))
    assert seen == {0, 1, 2}


def test_equation_16_is_the_factors_squared_norms(samples):
    factors = [torch.full((2, 3), 2.0), torch.full((5, 2), -1.0)]
    assert float(squared_norm(factors)) == 24 + 10
    *_, last = objective(samples, lambda x, *_: x, factors=factors, frobenius=0.5).losses_at(0)
    assert float(last["frobenius"]) == 17


# -- LoRAs on networks --------------------------------------------------------------------------------


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 8), torch.nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def small(rank=2, alpha=4.0, names=("default",)):
    torch.manual_seed(0)
    network = Small()
    layers = layers_of(network, lambda name: True)
    for name in names:
        add_lora(network, layers, rank=rank, alpha=alpha, name=name)
    return network


def test_a_lora_starts_gaussian_and_zero_so_that_nothing_changes():
    torch.manual_seed(0)
    plain = Small()
    network, x = small(), torch.randn(3, 6)
    factors = factors_of(network)
    assert list(factors) == ["first.lora_A", "first.lora_B", "second.lora_A", "second.lora_B"]
    assert torch.equal(network(x), plain(x))
    assert all(float(factors[name].detach().abs().max()) == 0 for name in factors if name.endswith("B"))
    assert all(0.2 < float(factors[name].detach().std()) < 0.9 for name in factors if name.endswith("A"))
    assert all(value.dtype == torch.float32 for value in factors.values())
    with torch.no_grad():
        factors["first.lora_B"].fill_(0.5)
    assert not torch.equal(network(x), plain(x))


def test_factors_are_in_float32_on_a_base_in_bf16():
    network = Small().to(torch.bfloat16)
    add_lora(network, ["first"], rank=2, alpha=2.0)
    assert {value.dtype for value in factors_of(network).values()} == {torch.float32}


def test_one_of_two_loras_is_trained_while_both_act():
    network = small(names=("a", "b"))
    trained = activate(network, ["a", "b"], "b")
    assert len(trained) == 4
    assert all(value.requires_grad for value in factors_of(network, "b").values())
    assert not any(value.requires_grad for value in factors_of(network, "a").values())


# -- the loop -----------------------------------------------------------------------------------------


def trainer(folder, network, **changes):
    options = {"save_every_s": 0.0, "ema": 0.9, "fingerprint": {"--rank": 2, "pictures": "a"}, **changes}
    recipe = Recipe("small", options.pop("steps", 6), constant_after_warm_up(0.02, 3), **options)
    made = Trainer(factors_of(network), recipe, folder / "log.jsonl", folder / "state.pt")
    made.resume()
    return made


def losses_of(network):
    def losses_at(step):
        generator = torch.Generator().manual_seed(step)
        for _ in range(2):
            x = torch.randn(8, 6, generator=generator)
            yield {"error": (network(x) - x[:, :4]).square().mean() / 2}

    return losses_at


def test_a_training_learns_and_is_logged(tmp_path):
    network = small()
    run = trainer(tmp_path, network, steps=120)
    run.run(losses_of(network), quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 121))
    first, last = (np.mean([line["error"] for line in part]) for part in (lines[:10], lines[-10:]))
    assert last < 0.6 * first
    draw_losses([tmp_path / "log.jsonl"], tmp_path / "losses.png")
    assert Image.open(tmp_path / "losses.png").width > 300


def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path):
    whole = small()
    run = trainer(tmp_path, whole, log_every=4)
    run.run(losses_of(whole), quiet=True)
    (tmp_path / "state.pt").unlink()

    class StoppedError(Exception):
        pass

    def stop(step):
        if step == 4:  # behind the state of step 3
            raise StoppedError

    first = small()
    with pytest.raises(StoppedError):
        trainer(tmp_path, first, log_every=4).run(losses_of(first), after_step=stop, quiet=True)
    second = small()
    with torch.no_grad():  # what it starts with does not matter
        for value in factors_of(second).values():
            value.add_(1.0)
    resumed = trainer(tmp_path, second, log_every=4)
    assert resumed.progress.step == 3
    resumed.run(losses_of(second), quiet=True)
    for name, value in factors_of(whole).items():
        assert torch.equal(value, factors_of(second)[name]), name
    with run.averaged(), resumed.averaged():
        assert all(torch.equal(value, factors_of(second)[name]) for name, value in factors_of(whole).items())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 4, 4]  # of the whole, the stopped and the resumed one
    assert len({line["error"] for line in lines}) == 1


def test_ctrl_c_keeps_what_was_done(tmp_path):
    network = small()

    def interrupted(step):
        if step == 2:
            raise KeyboardInterrupt
        return losses_of(network)(step)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, network, save_every_s=1000.0).run(interrupted, quiet=True)
    kept, again = factors_of(network), small()
    assert trainer(tmp_path, again).progress.step == 2
    assert all(torch.equal(value, kept[name]) for name, value in factors_of(again).items())


def test_the_average_is_left_behind_and_put_back(tmp_path):
    network = small()
    run = trainer(tmp_path, network)
    run.run(losses_of(network), quiet=True)
    now = {name: value.detach().clone() for name, value in factors_of(network).items()}
    with run.averaged():
        assert any(not torch.equal(value, now[name]) for name, value in factors_of(network).items())
    assert all(torch.equal(value, now[name]) for name, value in factors_of(network).items())


def test_other_settings_and_a_damaged_state_are_refused(tmp_path):
    network = small()
    trainer(tmp_path, network, steps=1).save_state()
    with pytest.raises(TrainingError) as raised:
        trainer(tmp_path, network, fingerprint={"--rank": 8, "pictures": "a"})
    assert (raised.value.expected, raised.value.found) == ("--rank 2", "--rank 8")
    (tmp_path / "state.pt").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="is damaged"):
        trainer(tmp_path, network)


def test_a_loss_that_is_not_finite_ends_it(tmp_path):
    network = small()
    with pytest.raises(TrainingError) as raised:
        trainer(tmp_path, network).run(
            lambda step: [{"error": network(torch.full((1, 6), torch.nan)).sum()}], quiet=True
        )
    assert "small, step 1" in raised.value.where
    assert all(torch.isfinite(value).all() for value in factors_of(network).values())


# -- pictures -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("a", (96, 64)), ("b", (64, 64)), ("c", (40, 200)), ("d", (200, 120))):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_a_picture_is_cut_from_its_middle(tmp_path):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    cut = load_cut(Picture(tmp_path / "a.png", ""), Crop(64))
    assert cut.shape == (64, 64, 3)
    assert cut.min() == 1.0


@pytest.mark.parametrize(
    ("size", "target"),
    [((512, 512), (512, 512)), ((3000, 2000), (640, 448)), ((2000, 3000), (448, 640)), ((9000, 1000), (704, 384))],
)
def test_buckets_keep_shape_and_area(size, target):
    assert Crop(512, buckets=True).target(size) == target
    assert Crop(512).target(size) == (512, 512)
    width, height = Crop(512, buckets=True).largest()
    assert width * height >= target[0] * target[1]


def test_small_pictures_are_refused(folder):
    with pytest.raises(ImageError) as raised:
        load_cut(Picture(folder / "c.png", ""), Crop(64))
    assert (raised.value.expected, raised.value.found) == ("at least 64 × 64 pixels", "40 × 200")


def test_the_same_picture_twice_counts_once(folder):
    (folder / "e.png").write_bytes((folder / "a.png").read_bytes())
    pictures, problems = find_pictures(folder)
    assert [picture.path.name for picture in pictures] == ["a.png", "b.png", "c.png", "d.png"]
    assert [(problem.where, problem.found) for problem in problems] == [(str(folder / "e.png"), "a.png")]


def test_a_picture_stays_on_its_side(folder):
    pictures, _ = find_pictures(folder)
    train, judge = split(pictures, 1)
    assert len(train) == 3
    assert not {picture.digest for picture in train} & {picture.digest for picture in judge}
    assert split(pictures[::-1], 1) == (train, judge)
    fewer = [picture for picture in pictures if picture != train[0]]
    assert split(fewer, 1)[1] == judge


# -- memory -------------------------------------------------------------------------------------------


def need(**changes):
    def make():
        network = Small().requires_grad_(False)
        add_lora(network, ["first", "second"], rank=2, alpha=2.0)
        return network

    options = {"precision": "fp32", "checkpointing": False, "average": False, **changes}
    rows = options.pop("rows", 1000)
    return memory.estimate(make, lambda network: network(torch.empty(rows, 6)), device=DEVICE, **options)


def test_memory_is_counted_without_any():
    one = need()
    assert one.base == 4 * (6 * 8 + 8 + 8 * 4)
    assert one.lora == 4 * 4 * (2 * (6 + 8) + 2 * (8 + 4))
    assert need(average=True).lora == one.lora * 5 // 4
    # What is kept: the input, its product with A, the first layer's output behind ReLU, and its product with A.
    assert 4 * 1000 * (6 + 2 + 8 + 2) <= one.activations <= 4 * 1000 * 3 * (6 + 2 + 8 + 2)
    assert need(rows=2000).activations == 2 * one.activations
    counts = {"vae": 1000, "text_encoder": 10**9, "text_encoder_2": 0}
    whole = memory.with_autoencoder(one, VaeArch((32, 64), 4), (640, 512), counts, samples=True)
    assert whole.total > 4 * 10**9
    assert (whole.decoder, whole.decoding) == (4000, 4 * 4 * 64 * 640 * 512)


# -- the file -----------------------------------------------------------------------------------------


def test_every_layer_of_sdxl_is_found_by_kohyas_name():
    from layouts import our_shapes

    manifest = Path(__file__).parent.parent / "data" / "full_manifest.json"
    shapes = {name: shape for name, shape in our_shapes(manifest).items() if name.startswith("unet.")}
    names = LayerNames(shapes)
    layers = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) > 1]
    assert len(layers) > 700
    assert all(names.find(kohya_name(layer.removeprefix("unet."))) == layer for layer in layers)
    attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert kohya_name(attention) == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"
    assert kohya_name("up_blocks.0.upsamplers.0.conv") == "lora_unet_output_blocks_2_2_conv"


def test_the_same_lora_gives_the_same_bytes(tmp_path):
    factors = {
        "conv_out.lora_A": np.ones((2, 3, 3, 3), np.float32),
        "conv_out.lora_B": np.ones((4, 2, 1, 1), np.float32),
    }
    for name in ("a", "b"):
        write_lora(tmp_path / name, factors, alpha=2.0, provenance={str(index): index for index in range(20)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# -- captions -----------------------------------------------------------------------------------------


class Seeing:
    """A captioner that looks, and counts."""

    source, model, looks = "http://localhost/v1", "llava", True

    def __init__(self):
        self.seen = []

    def describe(self, photo, picture):
        self.seen.append(Image.open(io.BytesIO(picture)).size)
        return Caption(f"picture {len(self.seen)}", self.source, self.model)


def test_a_picture_is_described_once(folder):
    captioner, crop = Seeing(), Crop(64)
    picture, other, *_ = find_pictures(folder)[0]

    def described(which):
        return caption_of(which, captioner, lambda each: load_cut(each, crop), folder / "cache")

    assert [described(picture), described(other), described(picture)] == ["picture 1", "picture 2", "picture 1"]
    assert captioner.seen == [(64, 64), (64, 64)]
    for file in (folder / "cache" / "captions").iterdir():
        file.write_text("damaged")
    assert described(picture) == "picture 3"


def test_missing_captions_are_an_error_that_names_them(folder):
    (folder / "a.txt").write_text("a caption")
    missing = []
    for picture in find_pictures(folder)[0]:
        try:
            assert caption_of(picture, Sidecar(), lambda each: None, folder) == "a caption"
        except CaptionError as error:
            missing.append((picture.path, error))
    with pytest.raises(CaptionError) as raised:
        require_captions(missing, 4)
    assert raised.value.problem == "3 of 4 pictures have no caption"
    assert "b.png, c.png, d.png" in raised.value.found
    require_captions([], 4)
