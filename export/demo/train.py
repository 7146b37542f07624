r"""Train the demo's networks from nothing, on pictures made by program.

python -m export.demo.train                      all stages into demo-training/; goes on where it was stopped
python -m export.demo.train --until denoise      the first two
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

from engine.console import run_command
from export.demo.curves import draw_losses
from export.demo.model import DemoModel, demo_architecture, save_checkpoints
from export.demo.stages import LORA_ALPHA, LORA_RANK, STAGES, Batch, Stage, make_loss, trainable
from export.demo.words import demo_tokenizer
from export.tokenizer import END_TOKEN, FILE

LORAS = ("landscape", "face")
LOSSES = "losses.jsonl"
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
    names = list(STAGES)[: list(STAGES).index(options.until) + 1]
    for name in names:
        if name in LORAS:
            _adapt(model, name, tokenizer, options)
        else:
            _advance(model, name, tokenizer, options)
    save_checkpoints(model, options.output)
    (options.output / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(options.output / "tokenizer" / FILE))
    draw_losses(options.output / LOSSES, options.output / "losses.png")
    return 0


def _advance(model: DemoModel, name: str, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """Bring the model to the end of a stage: by what an earlier run saved, or by training."""
    done = options.output / "stages" / f"{name}.safetensors"
    if done.is_file():
        model.load_state_dict(load_file(done))
        return
    start = {
        "vae": lambda: model.start_autoencoder(options.seed),
        "denoise": model.start_denoise_encoder,
        "control": model.start_controlnet,
    }
    if name in start:
        start[name]()
    _train(model, name, tokenizer, options)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, done)


def _adapt(model: DemoModel, name: str, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """Train a LoRA beside the model, which stays as it is, and write its file."""
    done = options.output / f"{name}.safetensors"
    if done.is_file():
        return
    adapted = DemoModel(model.arch, model.end_id).to(options.device)
    adapted.load_state_dict(model.state_dict())
    layers = [
        key
        for key, module in adapted.unet.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and "embedding" not in key
    ]
    # One factor Gaussian, the other zero, as in the paper.
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=layers, init_lora_weights="gaussian")
    inject_adapter_in_model(config, adapted.unet)
    _train(adapted, name, tokenizer, options)
    tensors = {
        f"unet.{key.replace('.default', '')}": value.to(torch.float16).contiguous()
        for key, value in adapted.unet.state_dict().items()
        if ".lora_" in key
    }
    configured = {"unet.r": LORA_RANK, "unet.lora_alpha": LORA_ALPHA}
    save_file(tensors, done, metadata={"lora_adapter_metadata": json.dumps(configured)})


def _train(model: DemoModel, name: str, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    stage, device = STAGES[name], torch.device(options.device)
    steps = max(1, int(stage.steps * options.scale))
    parameters = trainable(model, name)
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, betas=_BETAS, weight_decay=1e-4)
    state_file, log_file = options.output / "stages" / f"{name}.state.pt", options.output / LOSSES
    first = 0
    if state_file.is_file():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    loss_of = make_loss(model, name, tokenizer, options.seed, first)
    sums: dict[str, float] = {}
    started = time.monotonic()
    for step in tqdm(range(first, steps), initial=first, total=steps, desc=name, disable=options.quiet, mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(stage, step, steps)
        seeds = np.random.SeedSequence([options.seed, list(STAGES).index(name), step])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        batch = Batch(
            np.random.default_rng(seeds),
            torch.Generator().manual_seed(int(seeds.generate_state(2)[1])),
            device,
            large=step >= steps * 2 // 3,
        )
        with torch.autocast(device.type, torch.bfloat16):
            losses = loss_of(batch)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        if not torch.isfinite(total):
            raise FloatingPointError(f"stage {name}, step {step}: the loss is not finite")
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for key, loss in losses.items():
            sums[key] = sums.get(key, 0.0) + float(loss.detach())
        if (step + 1) % _LOG_EVERY == 0:
            means = {key: round(value / _LOG_EVERY, 6) for key, value in sums.items()}
            line = {"stage": name, "step": step + 1, "seconds": round(time.monotonic() - started, 1), **means}
            with log_file.open("a") as log:
                log.write(json.dumps(line) + "\n")
            sums = {}
        if (step + 1) % _SAVE_EVERY == 0 and step + 1 < steps:
            _save_state(state_file, model, optimizer, step + 1)
    state_file.unlink(missing_ok=True)


def _save_state(file: Path, model: DemoModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    temporary = file.with_suffix(".part")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
    temporary.replace(file)


def _learning_rate(stage: Stage, step: int, steps: int) -> float:
    if stage.constant:
        return stage.lr
    warm = min(1.0, (step + 1) / _WARM_UP)
    return stage.lr * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.demo.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo-training"), metavar="DIR")
    parser.add_argument("--until", choices=list(STAGES), default=list(STAGES)[-1], help="the last stage to train")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="times the number of steps")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
