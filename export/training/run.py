"""A LoRA from a checkpoint and a folder of pictures: checked, encoded, trained, written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from engine.bundle.hashing import hash_file
from engine.bundle.sdxl import TOKENS
from engine.cli.captions import make_captioner
from engine.errors import OutOfMemoryError, first_line
from engine.units import format_memory
from export.graphs.nets.unet import UNet
from export.graphs.nets.vae import VaeDecoderGraph
from export.training.adapters import add_lora, factors_of, layers_of
from export.training.curves import draw_losses
from export.training.dataset import Crop, find_pictures
from export.training.encode import Sample
from export.training.loop import Recipe, Trainer, TrainingError, constant_after_warm_up
from export.training.lora_file import write_lora
from export.training.memory import MemoryNeed, estimate, require, with_autoencoder
from export.training.networks import Base, ControlledUNet, checkpoint_blocks, load, open_base, without_control
from export.training.objective import Network, Objective
from export.training.prepare import (
    Dataset,
    Machine,
    Reporter,
    check_output,
    encode_pictures,
    machine_of,
    training_folder,
)
from export.training.request import TrainRequest
from export.training.samples import SHOWN, Sampler, draw_samples

STATE, LOG, CURVES, SAMPLES = "state.pt", "log.jsonl", "losses.png", "samples"
#: Seconds of work that a kill costs at most, and a step.
SAVE_EVERY_S = 300.0


@dataclass(frozen=True)
class Trained:
    """What a training gave.

    Attributes:
        output: the LoRA's file. curves: a picture of the losses.
        trained_on, held_out: pictures. left_out: files that could not be used.
        steps: of the optimizer, and how many of them this run took.
        before, after: the held-out loss.
    """

    output: Path
    curves: Path
    trained_on: int
    held_out: int
    left_out: int
    steps: int
    steps_now: int
    before: float
    after: float


def train_lora(request: TrainRequest, reporter: Reporter) -> Trained:
    """Train a LoRA, or go on with a training that was stopped.

    Args:
        request: what the user asked for.
        reporter: told how it goes.
    Raises:
        UsageError, InputError, ImageError, CheckpointError, CaptionError, OutputError: something that was given
            cannot be used.
        DoesNotFitError, OutOfMemoryError: memory does not hold the training.
        TrainingError: it cannot go on, or has diverged.
    """
    check_output(request)
    machine = machine_of(request)
    captioner = make_captioner(request.caption, request.caption_model)
    found = find_pictures(request.images, recursive=request.recursive)
    base = open_base(request.sdxl, request.tokenizer, unet=request.unet, supir=request.supir)
    need = memory_need(request, base, machine)
    free = require(need, machine.device)
    reporter.say(f"memory, about {need}; {format_memory(free)} are free")
    with training_folder(request.work, SAMPLES):
        try:
            dataset = encode_pictures(request, base, machine.device, captioner, found, reporter)
            return _train(request, base, machine, dataset, reporter)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                "out of memory while training",
                expected=str(need),
                found=first_line(error),
                fix="lower --at-once or --size; the training goes on from its last state",
            ) from error


def memory_need(request: TrainRequest, base: Base, machine: Machine) -> MemoryNeed:
    """Return what a training takes, from the sizes of the networks alone."""
    arch, (width, height) = base.arch, Crop(request.size_px, request.buckets).largest()
    cells = (height // arch.vae.pixels_per_cell, width // arch.vae.pixels_per_cell)

    def make() -> nn.Module:
        network = _network(request, base)
        network.requires_grad_(False)
        unet = _unet_of(network)
        add_lora(unet, layers_of(unet, request.wants_layer), rank=request.rank, alpha=request.alpha)
        return network

    def run(network: nn.Module) -> Tensor:
        rows = request.at_once
        z = torch.empty(rows, arch.unet.latent_channels, *cells)
        text = torch.empty(rows, TOKENS, arch.unet.context_channels), torch.empty(rows, arch.unet.vector_channels)
        return _as_network(network)(z, torch.empty(rows), z if request.supir else None, *text)

    counts: dict[str, int] = {}
    for name, tensor in base.tensors.items():
        component = name.partition(".")[0]
        counts[component] = counts.get(component, 0) + math.prod(tensor.shape)
    need = estimate(
        make,
        run,
        device=machine.device,
        precision=machine.precision,
        checkpointing=request.checkpointing,
        average=request.ema is not None,
    )
    return with_autoencoder(need, arch.vae, (width, height), counts, samples=request.samples)


# -- training ---------------------------------------------------------------------------------------


def _network(request: TrainRequest, base: Base) -> nn.Module:
    return UNet(base.arch.unet) if request.supir is None else ControlledUNet(base.arch.unet)


def _unet_of(network: nn.Module) -> nn.Module:
    return network.unet if isinstance(network, ControlledUNet) else network


def _as_network(network: nn.Module) -> Network:
    """Return a network as a function of the noisy and, under control, the degraded latent."""
    if isinstance(network, ControlledUNet):
        return network

    def plain(x: Tensor, timestep: Tensor, lq: Tensor | None, context: Tensor, vector: Tensor) -> Tensor:
        assert isinstance(network, UNet)
        return without_control(network, x, timestep, context, vector)

    return plain


def _train(request: TrainRequest, base: Base, machine: Machine, dataset: Dataset, reporter: Reporter) -> Trained:
    network, factors = _with_lora(request, base, machine)
    objective = Objective(
        _as_network(network),
        list(factors.values()),
        dataset.samples,
        dataset.held_out,
        dataset.no_text,
        machine.device,
        batch=request.batch,
        at_once=request.at_once,
        seed=request.seed,
        no_text_share=request.no_text_share,
        frobenius=request.frobenius,
        controlled=request.supir is not None,
        half=machine.half,
    )
    recipe = Recipe(
        request.name,
        request.steps,
        constant_after_warm_up(request.learning_rate, request.warm_up),
        ema=request.ema,
        save_every_s=SAVE_EVERY_S,
        fingerprint=_fingerprint(request, base, machine, dataset),
    )
    log, state, curves = (request.work / name for name in (LOG, STATE, CURVES))
    trainer = Trainer(factors, recipe, log, state)
    # While the LoRA changes nothing yet.
    draw = _sampling(request, base, machine, network, dataset.held_out) if request.samples else None
    if trainer.resume():
        _check_steps(trainer.progress.step, request, state)
        reporter.say(f"going on at step {trainer.progress.step} of {request.steps}, from {state}")
    else:
        log.unlink(missing_ok=True)
        trainer.notes["held out before"] = objective.held_out_loss()
        trainer.log({"held out": round(trainer.notes["held out before"], 6)})
    first, after = trainer.progress.step, None

    def look(step: int) -> None:
        nonlocal after
        if step % request.every and step != request.steps:
            return
        with trainer.averaged():
            after = objective.held_out_loss()
            if draw is not None:
                draw(request.work / SAMPLES / f"{step:06d}.png")
        trainer.log({"held out": round(after, 6)})
        draw_losses([log], curves)

    trainer.run(objective.losses_at, after_step=look, quiet=reporter.quiet)
    trainer.save_state()  # more steps may be wanted later
    with trainer.averaged():
        if after is None:  # all steps were done before
            after = objective.held_out_loss()
        write_lora(
            request.output,
            {name: value.detach().cpu().numpy() for name, value in factors.items()},
            alpha=request.alpha,
            form=request.form,
            provenance={**recipe.fingerprint, "steps": request.steps, "pictures": len(dataset.samples)},
        )
    draw_losses([log], curves)
    return Trained(
        request.output,
        curves,
        len(dataset.samples),
        len(dataset.held_out),
        dataset.left_out,
        request.steps,
        request.steps - first,
        trainer.notes["held out before"],
        after,
    )


def _with_lora(request: TrainRequest, base: Base, machine: Machine) -> tuple[nn.Module, dict[str, Parameter]]:
    """Return the network with a LoRA that changes nothing yet, and the LoRA's factors."""
    prefix = "unet." if request.supir is None else ""
    network = load(
        lambda: _network(request, base), base.tensors, machine.device, prefix=prefix, precision=machine.precision
    )
    unet = _unet_of(network)
    if request.checkpointing:
        checkpoint_blocks(network)
    torch.manual_seed(request.seed)
    add_lora(unet, layers_of(unet, request.wants_layer), rank=request.rank, alpha=request.alpha)
    return network, factors_of(unet)


def _sampling(
    request: TrainRequest, base: Base, machine: Machine, network: nn.Module, held_out: Sequence[Sample]
) -> Callable[[Path], None]:
    """Return the function that draws held-out pictures; what the network makes of them now is "without the LoRA"."""
    decoder = load(lambda: VaeDecoderGraph(base.arch.vae), base.tensors, machine.device)
    sampler = Sampler(
        _as_network(network), decoder, machine.device, request.seed, request.supir is not None, machine.half
    )
    shown = held_out[:SHOWN]
    without = [sampler.run(item, number) for number, item in enumerate(shown)]
    return lambda picture: draw_samples(sampler, shown, without, picture)


def _fingerprint(request: TrainRequest, base: Base, machine: Machine, dataset: Dataset) -> dict[str, Any]:
    """Return everything that decides the result but the number of steps."""
    names = [(sample.file.name, sample.text.file.name) for sample in (*dataset.samples, *dataset.held_out)]
    return {
        **request.settings(),
        "--precision": machine.precision,
        "checkpoints": {file.name: hash_file(file) for checkpoint in base.checkpoints for file in checkpoint.files},
        "pictures and captions": hashlib.sha256(repr(names).encode()).hexdigest()[:16],
    }


def _check_steps(done: int, request: TrainRequest, state: Path) -> None:
    if done > request.steps:
        raise TrainingError(
            "more steps are done than were asked for",
            where=state,
            expected=f"--steps {done} or more",
            found=f"--steps {request.steps}",
            fix="choose another --work to begin again",
        )
