"""The demo's training from nothing to files that build, at a size that takes seconds."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("scipy", reason="needs the train extra")

from PIL import Image
from safetensors.torch import load_file

from export.demo import stages, train
from export.demo.data import pairs_from
from export.plan import make_plan
from export.request import BuildRequest, LoraRequest


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
        patch.setattr(train, "_SAVE_EVERY", 1)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    assert train.main(["--output", str(folder), "--quiet", "--device", "cpu"]) == 0
    return folder


def test_every_stage_is_logged_and_drawn(trained):
    lines = [json.loads(line) for line in (trained / "losses.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [name for name in stages.STAGES for _ in range(3)]
    assert all(np.isfinite(list(line.values())[2:]).all() for line in lines)
    assert {"noise", "frobenius"} <= set(lines[-1])
    assert Image.open(trained / "losses.png").width > 1000


def test_the_files_are_checkpoints_and_loras_of_one_model(trained, tmp_path):
    loras = tuple(LoraRequest(name, trained / f"{name}.safetensors") for name in train.LORAS)
    request = BuildRequest(
        trained / "sdxl.safetensors", trained / "supir.safetensors", trained / "tokenizer", tmp_path / "b", loras=loras
    )
    plan = make_plan(request)
    assert plan.arch.vae.latent_channels == 32
    assert plan.arch.vae.pixels_per_cell == 8
    assert all(lora.ranks == (stages.LORA_RANK,) and lora.alphas == (stages.LORA_ALPHA,) for lora in plan.loras)
    assert len(plan.loras[0].deltas) > 50


def test_each_stage_trains_its_own_part(trained):
    """And leaves all others to the bit: the base stays frozen under ControlNet and LoRAs."""
    before = load_file(trained / "stages" / "vae.safetensors")
    parts = {
        "denoise": ("denoise_encoder.",),
        "prior": ("unet.", "text_encoder.", "text_encoder_2."),
        "control": ("controlnet.", "connectors."),
    }
    for stage, prefixes in parts.items():
        after = load_file(trained / "stages" / f"{stage}.safetensors")
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        assert changed
        assert all(name.startswith(prefixes) for name in changed), stage
        before = after


def test_a_stopped_training_goes_on_to_the_same_result(trained, tmp_path, monkeypatch):
    class StoppedError(Exception):
        pass

    save = train._save_state

    def stop(file, model, optimizer, step):
        save(file, model, optimizer, step)
        if file.name.startswith("denoise") and step == 2:
            raise StoppedError

    arguments = ["--output", str(tmp_path), "--quiet", "--device", "cpu", "--until", "prior"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "_save_state", stop)
        with pytest.raises(StoppedError):
            train.main(arguments)
    monkeypatch.setattr(train.DemoModel, "start_autoencoder", lambda *_: pytest.fail("began again"))
    assert train.main(arguments) == 0
    for stage in ("denoise", "prior"):
        whole, resumed = (load_file(folder / "stages" / f"{stage}.safetensors") for folder in (trained, tmp_path))
        for name, tensor in whole.items():
            assert torch.equal(tensor, resumed[name]), (stage, name)


def test_a_lora_starts_as_nothing(trained):
    """B is zero at the start, so after three steps it is still small, and A is not."""
    tensors = load_file(trained / "landscape.safetensors")
    up = max(float(value.abs().max()) for name, value in tensors.items() if "lora_B" in name)
    down = max(float(value.abs().max()) for name, value in tensors.items() if "lora_A" in name)
    assert 0 < up < 1e-3
    assert down > 0.1
