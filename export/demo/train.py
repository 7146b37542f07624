r"""Train the demo's networks from nothing, on pictures made by program.

python -m export.demo.train                  all stages into demo-training/; goes on where it was stopped
python -m export.demo.train --only denoise   one stage, after those that it needs; vae, denoise and prior
                                             need none, so they can be trained side by side
python -m export.demo.train --only loras --start export/demo/weights
                                             LoRAs on finished checkpoints, those that ship or your own
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tqdm import tqdm

from engine.bundle.storage import atomic_write
from engine.cli.console import run_command
from engine.cli.options import command_parser
from engine.errors import UsageError
from export.checkpoint.tokenizer import END_TOKEN, FILE
from export.demo.curves import draw_losses
from export.demo.model import DemoModel, demo_architecture, half_products, load_checkpoints, save_checkpoints
from export.demo.stages import (
    LORA_ALPHA,
    LORA_FAMILIES,
    LORA_LAYERS,
    LORA_RANK,
    STAGES,
    Batch,
    Stage,
    make_loss,
    sample_noised,
    trainable,
)
from export.demo.words import demo_tokenizer

_LOG_EVERY, _SAVE_EVERY = 20, 200
_WARM_UP = 100
#: Runs are short, so the second moment's average is short too.
_BETAS = (0.9, 0.99)


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = _parser().parse_args(arguments)
    (options.output / "stages").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    tokenizer = demo_tokenizer()
    end_id = tokenizer.token_to_id(END_TOKEN)
    assert end_id is not None
    model = DemoModel(demo_architecture(tokenizer.get_vocab_size()), end_id).to(options.device)
    model.start_autoencoder(options.seed)
    model.start_denoise_encoder()
    model.start_unet()
    if options.start is not None:
        if options.only is None:
            raise UsageError("--start is for one stage", fix="name it with --only")
        load_checkpoints(model, options.start)
    needed = STAGES[options.only].needs if options.only and options.start is None else ()
    for name in STAGES if options.only is None else (*needed, options.only):
        done = options.output / "stages" / f"{name}.safetensors"
        if done.is_file():
            _load(model, name, done)
        elif options.only in (None, name):
            _advance(model, name, tokenizer, options)
            save_file(_result(model, name), done)
        else:
            raise UsageError(f"stage {options.only} needs stage {name}", where=done, fix=f"train it: --only {name}")
    if options.only is None:
        _save_all(model, tokenizer, options.output)
    elif options.only == "loras":
        _save_loras(model, options.output)
    _draw(options.output)
    return 0


def _advance(model: DemoModel, name: str, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """Train a stage, from where the stages before it, or an earlier run of its own, have come."""
    if name == "control":
        noised = sample_noised(tokenizer, options.seed, torch.device(options.device))
        with torch.no_grad():
            model.start_control(noised.scaled, noised.timestep, *model.read(*noised.text))
    if name == "loras":
        _add_loras(model)
    _train(model, name, tokenizer, options)


def _add_loras(model: DemoModel) -> None:
    layers = [
        key
        for key, module in model.unet.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and key.startswith(LORA_LAYERS)
    ]
    for name in LORA_FAMILIES:
        # One factor Gaussian, the other zero, as in the paper.
        config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=layers, init_lora_weights="gaussian")
        inject_adapter_in_model(config, model.unet, adapter_name=name)


def _result(model: DemoModel, name: str) -> dict[str, torch.Tensor]:
    keeps = STAGES[name].keeps
    return {
        key: value.contiguous()
        for key, value in model.state_dict().items()
        if (key.startswith(keeps) if keeps else ".lora_" in key)
    }


def _load(model: DemoModel, name: str, file: Path) -> None:
    if not STAGES[name].keeps:
        _add_loras(model)
    missing, unexpected = model.load_state_dict(load_file(file), strict=False)
    lost = set(missing) & set(_result(model, name))
    if lost or unexpected:
        raise UsageError(
            "a stage's result is of another model",
            where=file,
            found=f"{len(lost)} tensors missing, {len(unexpected)} unknown",
            fix="delete it to train the stage again",
        )


def _save_all(model: DemoModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that a user of real models has: two checkpoints, LoRAs, the tokenizer."""
    _save_loras(model, folder)
    plain = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items() if ".lora_" not in key}
    save_checkpoints(plain, model.arch, folder)
    (folder / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer" / FILE))


def _save_loras(model: DemoModel, folder: Path) -> None:
    for name in LORA_FAMILIES:
        tensors = {
            key.replace(f".{name}.", "."): value.to(torch.float16).contiguous()
            for key, value in model.state_dict().items()
            if ".lora_" in key and f".{name}." in key
        }
        configured = {"unet.r": LORA_RANK, "unet.lora_alpha": LORA_ALPHA}
        save_file(tensors, folder / f"{name}.safetensors", metadata={"lora_adapter_metadata": json.dumps(configured)})


def _draw(folder: Path) -> None:
    logs = [folder / "stages" / f"{name}.jsonl" for name in STAGES]
    draw_losses([log for log in logs if log.is_file()], folder / "losses.png")


def _train(model: DemoModel, name: str, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    stage, device = STAGES[name], torch.device(options.device)
    steps = max(1, int(stage.steps * options.scale))
    parameters = trainable(model, stage)
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, betas=_BETAS, weight_decay=1e-4)
    state_file, log_file = (options.output / "stages" / f"{name}.{suffix}" for suffix in ("state.pt", "jsonl"))
    first = 0
    if state_file.is_file():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    loss_of = make_loss(model, name, tokenizer, options.seed, first)
    sums: dict[str, list[float]] = {}
    started = time.monotonic()
    for step in tqdm(range(first, steps), initial=first, total=steps, desc=name, disable=options.quiet, mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(stage, step, steps)
        seeds = np.random.SeedSequence([options.seed, list(STAGES).index(name), step])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        batch = Batch(
            step,
            np.random.default_rng(seeds),
            torch.Generator().manual_seed(int(seeds.generate_state(2)[1])),
            device,
            large=step >= steps * 2 // 3,
        )
        with half_products(device, wanted=stage.autocast):
            losses = loss_of(batch)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        if not torch.isfinite(total):
            raise FloatingPointError(f"stage {name}, step {step}: the loss is not finite")
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for key, loss in losses.items():
            sums.setdefault(key, []).append(float(loss.detach()))
        if (step + 1) % _LOG_EVERY == 0:
            means = {key: round(sum(values) / len(values), 6) for key, values in sums.items()}
            line = {"stage": name, "step": step + 1, "seconds": round(time.monotonic() - started, 1), **means}
            with log_file.open("a") as log:
                log.write(json.dumps(line) + "\n")
            sums = {}
        if (step + 1) % _SAVE_EVERY == 0 and step + 1 < steps:
            _save_state(state_file, model, optimizer, step + 1)
    state_file.unlink(missing_ok=True)


def _save_state(file: Path, model: DemoModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    with atomic_write(file, "keep the state of the training") as whole:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, whole)


def _learning_rate(stage: Stage, step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / _WARM_UP)
    return stage.lr * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python -m export.demo.train", __doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-training"), metavar="DIR")
    parser.add_argument("--only", choices=list(STAGES), help="train this stage alone")
    parser.add_argument(
        "--start", type=Path, metavar="DIR", help="finished checkpoints to begin with, instead of earlier stages"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="times the number of steps")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
