"""The demo's training from nothing to files that build, at a size that takes seconds."""

import dataclasses
import json
import shutil
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("scipy", reason="needs the train extra")

from PIL import Image
from safetensors.torch import load_file, save_file

from engine.cli.console import run_command
from export.build.build_plan import make_plan
from export.build.request import BuildRequest, LoraRequest
from export.demo import stages, train
from export.demo.data import pairs_from
from export.demo.model import LATENT_CHANNELS
from export.training.loop import Trainer


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        tiny = {
            name: dataclasses.replace(stage, steps=3, batch=4, window=2, crop_px=64)
            for name, stage in stages.STAGES.items()
        }
        patch.setattr(stages, "STAGES", tiny)
        patch.setattr(train, "STAGES", tiny)
        patch.setattr(stages, "pairs_from", partial(pairs_from, workers=0))
        patch.setattr(train, "_LOG_EVERY", 1)
        patch.setattr(train, "_SAVE_EVERY_S", 0.0)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    assert train.main(["--output", str(folder), "--quiet", "--device", "cpu"]) == 0
    return folder


def test_every_stage_is_logged_and_drawn(trained):
    for name in stages.STAGES:
        lines = [json.loads(line) for line in (trained / "stages" / f"{name}.jsonl").read_text().splitlines()]
        assert [(line["stage"], line["step"]) for line in lines] == [(name, step) for step in (1, 2, 3)]
        assert all(np.isfinite(list(line.values())[2:]).all() for line in lines)
    assert [{"landscape", "face"} & set(line) for line in lines] == [{"landscape"}, {"face"}, {"landscape"}]
    assert all("frobenius" in line for line in lines)
    assert Image.open(trained / "losses.png").width > 1000


def test_the_files_are_checkpoints_and_loras_of_one_model(trained, tmp_path):
    loras = tuple(LoraRequest(name, trained / f"{name}.safetensors") for name in stages.LORA_FAMILIES)
    request = BuildRequest(
        trained / "sdxl.safetensors", trained / "supir.safetensors", trained / "tokenizer", tmp_path / "b", loras=loras
    )
    plan = make_plan(request)
    assert plan.arch.vae.latent_channels == LATENT_CHANNELS
    assert plan.arch.vae.pixels_per_cell == 8
    assert all(lora.ranks == (stages.LORA_RANK,) and lora.alphas == (stages.LORA_ALPHA,) for lora in plan.loras)
    assert len(plan.loras[0].deltas) == 13  # conv_out, and four layers in each of three blocks


def test_each_stage_keeps_its_own_part(trained):
    """And all of them together are the model: the base stays frozen under ControlNet and LoRAs."""
    kept = {name: set(load_file(trained / "stages" / f"{name}.safetensors")) for name in stages.STAGES}
    assert all(".lora_" in name for name in kept.pop("loras"))
    assert kept.pop("decode") < kept["vae"]
    assert kept["control"] < kept.pop("steps")
    assert sum(map(len, kept.values())) == len(set().union(*kept.values()))
    files = [load_file(trained / file) for file in ("sdxl.safetensors", "supir.safetensors")]
    fused = 2 * 4 * 2  # projections that open_clip fuses: of two layers, two of three, weight and bias
    assert sum(map(len, kept.values())) - sum(map(len, files)) == fused // 2
    base = load_file(trained / "stages" / "steps.safetensors")["unet.conv_in.weight"]
    assert torch.equal(files[0]["model.diffusion_model.input_blocks.0.0.weight"], base.half())


def test_a_stage_trains_only_what_it_names(trained, tmp_path):
    """The encoder is the code: it is kept, not trained."""
    torch.manual_seed(0)
    tokenizer = train.demo_tokenizer()
    model = train.DemoModel(train.demo_architecture(tokenizer.get_vocab_size()), 1)
    model.start_autoencoder(0)
    before, after = model.state_dict(), load_file(trained / "stages" / "vae.safetensors")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("vae.decoder.", "vae.post_quant_conv.")) for name in changed)


def test_a_stage_alone_needs_those_before_it(trained, tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--quiet", "--device", "cpu", "--only", "control"]
    assert run_command(train.main, arguments) == 2
    assert "stage control needs stage denoise" in capsys.readouterr().err
    (tmp_path / "stages").mkdir(exist_ok=True)
    for name in ("denoise", "prior"):
        shutil.copy(trained / "stages" / f"{name}.safetensors", tmp_path / "stages")
    assert train.main(arguments) == 0
    alone, whole = (load_file(folder / "stages" / "control.safetensors") for folder in (tmp_path, trained))
    assert all(torch.equal(alone[name], tensor) for name, tensor in whole.items())
    assert not (tmp_path / "sdxl.safetensors").exists()


def test_a_stopped_training_goes_on_to_the_same_result(trained, tmp_path, monkeypatch):
    class StoppedError(Exception):
        pass

    save = Trainer.save_state

    def stop(self):
        save(self)
        if self.progress.step == 2:
            raise StoppedError

    arguments = ["--output", str(tmp_path), "--quiet", "--device", "cpu", "--only", "denoise"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_state", stop)
        with pytest.raises(StoppedError):
            train.main(arguments)
    assert train.main(arguments) == 0
    whole, resumed = (load_file(folder / "stages" / "denoise.safetensors") for folder in (trained, tmp_path))
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_result_of_another_model_is_told(trained, tmp_path, capsys):
    (tmp_path / "stages").mkdir()
    save_file({"unet.conv_in.weight": torch.zeros(64, 24, 3, 3)}, tmp_path / "stages" / "prior.safetensors")
    assert run_command(train.main, ["--output", str(tmp_path), "--quiet", "--only", "prior", "--device", "cpu"]) == 2
    assert "is of another model" in capsys.readouterr().err


def test_a_lora_starts_as_nothing(trained):
    """B is zero at the start, so after three steps it is still small, and A is not."""
    tensors = load_file(trained / "landscape.safetensors")
    up = max(float(value.abs().max()) for name, value in tensors.items() if "lora_B" in name)
    down = max(float(value.abs().max()) for name, value in tensors.items() if "lora_A" in name)
    assert 0 < up < 1e-3
    assert down > 0.1
