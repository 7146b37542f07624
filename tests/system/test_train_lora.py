"""A LoRA from a checkpoint and a folder of pictures, as a user trains it; read by diffusers, and merged by a build."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic import TINY_UNET

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("peft", reason="needs the train extra")

from chat_server import Model, chat, serving
from PIL import Image
from safetensors import safe_open

from engine.cli.console import run_command
from export.checkpoint.checkpoint import open_sdxl
from export.checkpoint.lora import merge_into, open_lora
from export.demo.pictures import make_picture
from export.train_lora import main
from export.training import loop, run
from export.training.lora_file import write_lora
from export.training.memory import MemoryNeed

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six pictures with captions."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(6):
        picture = make_picture("portrait", 3, index, 72)
        Image.fromarray(picture.rgb).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(picture.caption)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def command(tiny, images, cache):
    """The command's arguments for a training of seconds."""

    def arguments(output, *more, folder=images, sdxl=tiny.sdxl):
        named = {"--sdxl": sdxl, "--tokenizer": tiny.tokenizer, "--images": folder, "--output": output}
        short = {
            "--cache": cache,
            "--size": 64,
            "--rank": 4,
            "--steps": 3,
            "--batch": 2,
            "--at-once": 4,
            "--device": "cpu",
        }
        given = [str(part) for pair in {**named, **short}.items() for part in pair]
        return [*given, "--precision", "fp32", "--quiet", "--no-samples", *map(str, more)]

    return arguments


@pytest.fixture(scope="module", autouse=True)
def memory_is_known():
    """Counting activations takes a second, which one test has."""
    kept = run.memory_need
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "memory_need", lambda *_: MemoryNeed(0, 0, 0, 0, 0, 0))
        yield kept


#: Of the trainings that are stopped, and the one that is not: with all that a state has to hold.
THOROUGH = ("--alpha", "6", "--ema", "0.5", "--frobenius", "0.001", "--learning-rate", "0.01", "--every", "2")


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "face.safetensors"
    assert main(command(output, *THOROUGH)) == 0
    return output


def test_what_is_written(trained):
    work = trained.with_suffix(".training")
    assert sorted(path.name for path in work.iterdir() if not path.name.startswith(".")) == [
        "log.jsonl", "losses.png", "samples", "state.pt"
    ]  # fmt: skip
    lines = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held out" in line] == [0, 2, 3]
    assert [line["step"] for line in lines if {"noise", "frobenius"} <= set(line)] == [1, 2, 3]
    with safe_open(trained, framework="np") as file:
        told = json.loads(file.metadata()["restoration_engine.training"])
        assert file.metadata()["ss_network_dim"] == "4"
    assert (told["steps"], told["--rank"], told["pictures"]) == (3, 4, 5)
    assert list(told["checkpoints"]) == ["sdxl.safetensors"]


def test_a_stopped_training_gives_the_same_bytes(command, trained, tmp_path, monkeypatch):
    """The state is a file of its own, of another process as it were; latents come from the cache."""

    class StoppedError(Exception):
        pass

    save = loop.Trainer.save_state

    def stop(self):
        save(self)
        if self.progress.step == 2:
            raise StoppedError

    output = tmp_path / "face.safetensors"
    monkeypatch.setattr(run, "SAVE_EVERY_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "save_state", stop)
        with pytest.raises(StoppedError):
            main(command(output, *THOROUGH))
    assert not output.exists()
    assert main(command(output, *THOROUGH)) == 0
    assert output.read_bytes() == trained.read_bytes()


@pytest.mark.slow
def test_a_finished_training_goes_on(command, trained, tmp_path, capsys):
    """To what more steps would have given at once; with other settings it does not."""
    work = trained.with_suffix(".training")
    longer, at_once = tmp_path / "longer.safetensors", tmp_path / "at-once.safetensors"
    more = (*THOROUGH, "--steps", 4)
    assert main(command(longer, *more, "--work", tmp_path / "face.training")) == 0
    state = (work / "state.pt").read_bytes()
    assert main(command(at_once, *more, "--work", work)) == 0
    assert at_once.read_bytes() == longer.read_bytes() != trained.read_bytes()
    (work / "state.pt").write_bytes(state)
    output = tmp_path / "other.safetensors"
    assert run_command(main, command(output, *THOROUGH, "--work", work, "--seed", 1)) == 1
    assert "expected: --seed 0\n  found:    --seed 1" in capsys.readouterr().err
    assert run_command(main, command(output, *THOROUGH, "--work", work, "--steps", 2)) == 1
    assert "more steps are done than were asked for" in capsys.readouterr().err


def test_the_names_are_comfyuis(trained, tiny):
    """`lora_unet_`, then the checkpoint's own name of the weight with underscores: its rule for LDM's names."""
    prefix = "model.diffusion_model."
    with safe_open(tiny.sdxl, framework="np") as file:
        weights = [name for name in file.keys() if name.startswith(prefix) and name.endswith(".weight")]  # noqa: SIM118
    known = {f"lora_unet_{name.removeprefix(prefix).removesuffix('.weight').replace('.', '_')}" for name in weights}
    with safe_open(trained, framework="np") as file:
        ends = [name.partition(".") for name in file.keys()]  # noqa: SIM118
    assert {layer for layer, _, _ in ends} <= known
    assert {end for _, _, end in ends} == {"lora_down.weight", "lora_up.weight", "alpha"}


def diffusers_unet(tiny):
    """diffusers' own UNet with the tiny base's weights."""
    from diffusers import UNet2DConditionModel

    tensors = open_sdxl(tiny.sdxl).tensors
    unet = UNet2DConditionModel(**TINY_UNET)
    state = {
        name.removeprefix("unet."): torch.from_numpy(tensor.read().copy())
        for name, tensor in tensors.items()
        if name.startswith("unet.")
    }
    unet.load_state_dict(state)
    return unet


def all_layers(tiny):
    """Factors of a LoRA on every layer of the UNet, of any values."""
    rng, factors = np.random.default_rng(0), {}
    for name, tensor in open_sdxl(tiny.sdxl).tensors.items():
        if name.startswith("unet.") and len(tensor.shape) > 1:
            layer, kernel = name.removeprefix("unet.").removesuffix(".weight"), tensor.shape[2:]
            factors[f"{layer}.lora_A"] = rng.standard_normal((4, tensor.shape[1], *kernel), np.float32)
            factors[f"{layer}.lora_B"] = rng.standard_normal((tensor.shape[0], 4, *(1 for _ in kernel)), np.float32)
    return factors


@pytest.mark.parametrize("form", ["trained", "kohya", "peft"])
def test_diffusers_loads_what_a_build_merges(form, trained, tiny, tmp_path):
    """Through `load_lora_weights` of SDXL's pipeline, fused into its UNet."""
    from diffusers import StableDiffusionXLPipeline

    file = trained
    if form != "trained":
        file = tmp_path / "all.safetensors"
        write_lora(file, all_layers(tiny), alpha=0.6, form=form, provenance={})
    unet = diffusers_unet(tiny)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    pipeline = StableDiffusionXLPipeline(unet=unet, **dict.fromkeys(parts))
    pipeline.load_lora_weights(file)
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    fused = unet.state_dict()
    tensors = open_sdxl(tiny.sdxl).tensors
    lora = open_lora("face", file, 1.0, {name: tensor.shape for name, tensor in tensors.items()})
    assert lora.kinds == ("LoRA",)
    changed = {name for name, value in before.items() if not torch.equal(value, fused[name])}
    assert changed == {name.removeprefix("unet.") for name in lora.deltas}
    assert len(changed) >= 136
    for name in changed:
        ours = merge_into(tensors[f"unet.{name}"].read(), f"unet.{name}", [lora])
        assert np.abs(fused[name].double().numpy() - ours).max() < 1e-6 * max(1, np.abs(ours).max()), name


def test_a_build_takes_it(trained, tiny, tmp_path, run_build):
    done = run_build(
        "--sdxl", tiny.sdxl, "--supir", tiny.supir, "--tokenizer", tiny.tokenizer, "--preset", "lightning-lora",
        "--lora", f"face={trained}", "--lora", f"again={trained}:0.5", "--output", tmp_path / "b", "--dry-run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "merge  face × 1: LoRA, rank 4, alpha 6, 136 weights" in done.stdout


@pytest.mark.parametrize("supir", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_samples_are_drawn(supir, command, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("export.training.samples.STEPS", 3)
    more = ("--supir", tiny.supir) if supir else ()
    arguments = command(tmp_path / "face.safetensors", "--steps", 1, "--batch", 1, "--held-out", 1, *more)
    arguments.remove("--no-samples")
    assert main(arguments) == 0
    sheet = Image.open(tmp_path / "face.training" / "samples" / "000001.png")
    assert sheet.width >= (4 if supir else 3) * 64
    assert np.asarray(sheet).std() > 20


# -- what can be wrong ----------------------------------------------------------------------------------


def test_what_cannot_be_used_is_left_out_and_told(command, images, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    Image.new("RGB", (32, 32)).save(folder / "small.png")
    (folder / "twice.png").write_bytes((folder / "0.png").read_bytes())
    assert main(command(tmp_path / "face.safetensors", "--steps", 1, "--json", folder=folder)) == 0
    printed = capsys.readouterr()
    assert "3 of 9 pictures are left out:" in printed.err
    for name in ("broken.jpg", "small.png: is too small", "twice.png: is the same as another (0.png)"):
        assert name in printed.err
    report = json.loads(printed.out)
    assert (report["trained_on"], report["held_out"], report["left_out"]) == (5, 1, 3)
    assert "0 encoded now" in printed.err  # by the pictures' content: those of `images` are known


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({"folder": "empty"}, 1, "holds no images"),
        ({"folder": "none"}, 1, "no such folder"),
        ({"folder": "no-captions"}, 1, "2 of 2 pictures have no caption"),
        ({"folder": "one"}, 1, "too few pictures to train on"),
        ({"output": "there.safetensors"}, 1, "exists already"),
        ({"output": "none/face.safetensors"}, 1, "no such folder"),
        ({"output": "face.ckpt"}, 2, "a LoRA is a .safetensors file"),
        ({"more": ("--size", "100")}, 2, "impossible size"),
        ({"more": ("--device", "cuda:7")}, 2, "there is no such GPU"),
        ({"more": ("--device", "toaster")}, 2, "is no device"),
        ({"more": ("--caption-model", "llava")}, 2, "only a server has models"),
        ({"sdxl": "face"}, 1, "another model than --sdxl needs"),
    ],
)
def test_a_mistake_is_told(change, status, told, command, tiny, tmp_path, capsys):
    for name in ("empty", "no-captions", "one"):
        (tmp_path / name).mkdir()
    for name in ("no-captions/a", "no-captions/b", "one/a"):
        Image.effect_noise((64, 64), 50).save(tmp_path / f"{name}.png")
    (tmp_path / "one" / "a.txt").write_text("noise")
    (tmp_path / "there.safetensors").touch()
    known = {} if "folder" not in change else {"folder": tmp_path / change["folder"]}
    if "sdxl" in change:
        known["sdxl"] = tiny.loras["face"]
    arguments = command(tmp_path / change.get("output", "face.safetensors"), *change.get("more", ()), **known)
    assert run_command(main, arguments) == status
    printed = capsys.readouterr()
    assert told in printed.err
    assert "Traceback" not in printed.err


def test_a_single_file_needs_a_tokenizer(tiny, images, tmp_path, capsys):
    arguments = ["--sdxl", tiny.sdxl, "--images", images, "--output", tmp_path / "a.safetensors"]
    assert run_command(main, list(map(str, arguments))) == 1
    assert "a single file holds no tokenizer" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_before_it_starts(command, tmp_path, memory_is_known, monkeypatch, capsys):
    monkeypatch.setattr(run, "memory_need", memory_is_known)
    monkeypatch.setattr("export.training.memory.available_memory_bytes", lambda: 100 << 20)
    assert run_command(main, command(tmp_path / "face.safetensors")) == 1
    printed = capsys.readouterr().err
    assert "the training does not fit" in printed
    assert "base 33.1 MiB" in printed
    assert not (tmp_path / "face.training").exists()


def test_a_second_training_in_one_folder_is_refused(command, trained, tmp_path, capsys):
    from filelock import FileLock

    with FileLock(trained.with_suffix(".training") / ".lock"):
        work = ("--work", trained.with_suffix(".training"))
        assert run_command(main, command(tmp_path / "face.safetensors", *work)) == 1
    assert "another training is under way here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_is_asked_once_for_each_picture(command, images, tmp_path, capsys):
    model = Model(chat("a drawn face"))
    with serving(model) as address:
        for name in ("a", "b"):
            output = tmp_path / f"{name}.safetensors"
            assert main(command(output, "--caption", address, "--steps", 1)) == 0
    assert len(model.asked) == 6
    assert {picture.size for picture in model.pictures} == {(64, 64)}
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("package", ["torch", pytest.param("peft", marks=pytest.mark.slow)])
def test_without_its_libraries_it_says_what_to_install(command, tmp_path, package):
    code = f"import sys\nsys.modules[{package!r}] = None\nfrom engine.cli.console import run_command\n"
    code += "from export.train_lora import main\nsys.exit(run_command(main))"
    done = subprocess.run(
        [sys.executable, "-c", code, *command(tmp_path / "face.safetensors")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert f"no module {package}" in done.stderr
    assert "pip install -e '.[train]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_losses_fall(command, tmp_path):
    """Training's and held-out pictures', on the synthetic base and 32 pictures; minutes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(32):
        Image.fromarray(make_picture("portrait", 5, index, 128).rgb).save(folder / f"{index}.png")
    options = ("--caption", "none", "--size", 128, "--batch", 8, "--at-once", 8, "--learning-rate", 1e-3)
    output = tmp_path / "face.safetensors"
    assert main(command(output, *options, "--rank", 16, "--steps", 150, "--every", 50, folder=folder)) == 0
    lines = [json.loads(line) for line in (tmp_path / "face.training" / "log.jsonl").read_text().splitlines()]
    noise = [line["noise"] for line in lines if "noise" in line]
    held_out = [line["held out"] for line in lines if "held out" in line]
    assert np.mean(noise[-20:]) < 0.98 * np.mean(noise[:20])
    assert held_out == sorted(held_out, reverse=True)
    assert held_out[-1] < 0.98 * held_out[0]
