"""A LoRA from a checkpoint and a folder of pictures: checked, encoded, trained, written."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

from engine.bundle.hashing import hash_file
from engine.cli.captions import Captioner, CaptionError, make_captioner
from engine.errors import (
    DoesNotFitError,
    ImageError,
    OutOfMemoryError,
    OutputError,
    RestoreError,
    UsageError,
    first_line,
    from_os_error,
)
from engine.image.photo import Pixels
from engine.units import format_memory
from export.graphs.nets.unet import UNet
from export.graphs.nets.vae import VaeDecoderGraph
from export.training.adapters import add_lora, factors_of, layers_of
from export.training.curves import draw_losses
from export.training.dataset import (
    Crop,
    Picture,
    caption_of,
    find_pictures,
    load_cut,
    require_captions,
    split,
    told,
)
from export.training.encode import LatentCache, Sample, Text, TextCache
from export.training.loop import Recipe, Trainer, TrainingError, constant_after_warm_up
from export.training.lora_file import write_lora
from export.training.memory import MemoryNeed, encoding_bytes, estimate, require
from export.training.networks import Base, ControlledUNet, checkpoint_blocks, load, open_base, without_control
from export.training.objective import Network, Objective
from export.training.precision import Precision, has_bf16
from export.training.request import TrainRequest
from export.training.samples import SHOWN, Sampler, draw_samples

STATE, LOG, CURVES, SAMPLES = "state.pt", "log.jsonl", "losses.png", "samples"
#: Seconds of work that a kill costs at most, and a step.
SAVE_EVERY_S = 300.0
Say = Callable[[str], None]


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


def train_lora(request: TrainRequest, say: Say = lambda line: None, *, quiet: bool = False) -> Trained:
    """Train a LoRA, or go on with a training that was stopped.

    Args:
        request: what the user asked for.
        say: told what a person should know, a line each.
        quiet: no progress bars.
    Raises:
        UsageError, InputError, ImageError, CheckpointError, CaptionError, OutputError: something that was given
            cannot be used.
        DoesNotFitError, OutOfMemoryError: memory does not hold the training.
        TrainingError: it cannot go on, or has diverged.
    """
    _check_output(request)
    device, precision = _device_of(request), _precision_of(request)
    captioner = make_captioner(request.caption, request.caption_model)
    pictures, problems = find_pictures(request.images, recursive=request.recursive)
    base = open_base(request.sdxl, request.tokenizer, unet=request.unet, supir=request.supir)
    crop = Crop(request.size_px, request.buckets)
    need = memory_need(request, base, device, precision)
    free = require(need, device)
    say(f"memory, about {need}; {format_memory(free)} are free")
    with ExitStack() as cleanup:
        cleanup.enter_context(_locked(request))
        samples, held_out, no_text = _encoded(request, base, crop, device, captioner, pictures, problems, say, quiet)
        try:
            return _train(request, base, device, precision, samples, held_out, no_text, len(problems), say, quiet)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                "out of memory while training",
                expected=str(need),
                found=first_line(error),
                fix="lower --at-once or --size; the training goes on from its last state",
            ) from error


# -- before -----------------------------------------------------------------------------------------


def _check_output(request: TrainRequest) -> None:
    output = request.output
    if output.suffix != ".safetensors":
        raise UsageError("a LoRA is a .safetensors file", where="--output", found=output)
    if os.path.lexists(output) and (output.is_dir() or not request.overwrite):
        raise OutputError("exists already", where=output, fix="choose another --output, or allow it with --overwrite")
    if not output.parent.is_dir():
        raise OutputError("no such folder", where=output.parent, fix="create it first")
    if not os.access(output.parent, os.W_OK):
        raise OutputError("no permission to write there", where=output.parent, fix="choose another place")


def _device_of(request: TrainRequest) -> torch.device:
    name = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError("is no device", where="--device", expected="cpu, cuda or cuda:1", found=name) from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError("is no device that is trained on", where="--device", expected="cpu or cuda", found=name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} GPUs, with torch {torch.__version__}"
        raise UsageError("there is no such GPU", where="--device", found=found, fix="use --device cpu")
    if device.type == "cuda":  # so that a resumed training gives the same bytes
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device


def _precision_of(request: TrainRequest) -> Precision:
    device = torch.device(request.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if request.precision == "bf16" and not has_bf16(device):
        fix = "use --precision fp32"
        raise UsageError("this device does not compute in bf16", where="--precision", found=device, fix=fix)
    return request.precision or ("bf16" if has_bf16(device) else "fp32")


def memory_need(request: TrainRequest, base: Base, device: torch.device, precision: Precision) -> MemoryNeed:
    """Return what a training takes, from the sizes of the networks alone."""
    arch = base.arch
    side = request.size_px // arch.vae.pixels_per_cell

    def make() -> nn.Module:
        network = _network(request, base)
        network.requires_grad_(False)
        unet = _unet_of(network)
        add_lora(unet, layers_of(unet, request.wants_layer), rank=request.rank, alpha=request.alpha)
        return network

    def run(network: nn.Module) -> Tensor:
        rows = request.at_once
        z = torch.empty(rows, arch.unet.latent_channels, side, side)
        text = torch.empty(rows, 77, arch.unet.context_channels), torch.empty(rows, arch.unet.vector_channels)
        return _as_network(network)(z, torch.empty(rows), z if request.supir else None, *text)

    counts: dict[str, int] = {}
    for name, tensor in base.tensors.items():
        component = name.partition(".")[0]
        counts[component] = counts.get(component, 0) + math.prod(tensor.shape)
    return estimate(
        make,
        run,
        device=device,
        precision=precision,
        checkpointing=request.checkpointing,
        average=request.ema is not None,
        encoding=encoding_bytes(arch, request.size_px, counts),
    )


def _locked(request: TrainRequest) -> ExitStack:
    """Make the training's folder, and keep other trainings out of it.

    Raises:
        TrainingError: another one is under way.
        OutputError: it cannot be made.
    """
    held = ExitStack()
    try:
        (request.work / SAMPLES).mkdir(parents=True, exist_ok=True)
        held.enter_context(FileLock(request.work / ".lock", timeout=0))
    except Timeout:
        raise TrainingError(
            "another training is under way here", where=request.work, fix="wait for it, or choose another --work"
        ) from None
    except OSError as error:
        raise from_os_error(error, request.work, "make the training's folder") from error
    return held


def _encoded(
    request: TrainRequest,
    base: Base,
    crop: Crop,
    device: torch.device,
    captioner: Captioner | None,
    pictures: Sequence[Picture],
    problems: list[RestoreError],
    say: Say,
    quiet: bool,
) -> tuple[list[Sample], list[Sample], Text]:
    """Return the samples to train on, those to judge by, and the text of no words; problems are added to."""
    total = len(pictures) + len(problems)
    latents = LatentCache(base, crop, request.cache, device, degraded=request.supir is not None)
    texts = TextCache(base, request.cache, device)
    no_text = texts.text("")
    found: dict[str, Sample] = {}
    mute: list[tuple[Path, CaptionError]] = []

    def cut(picture: Picture) -> Pixels:
        return load_cut(picture, crop)

    for picture in tqdm(pictures, desc="latents", disable=quiet, mininterval=1):
        try:
            sample = latents.sample(picture, cut, no_text)
            caption = "" if captioner is None else caption_of(picture, captioner, cut, request.cache)
        except CaptionError as error:
            mute.append((picture.path, error))
        except (ImageError, DoesNotFitError) as error:
            problems.append(error)
        else:
            found[picture.digest] = Sample(sample.picture, sample.file, sample.shape, texts.text(caption))
    for line in told(problems, total):
        say(line)
    require_captions(mute, total)
    usable = [picture for picture in pictures if picture.digest in found]
    held_out = request.held_out or min(100, max(1, len(usable) // 10))
    if len(usable) <= held_out:
        raise ImageError(
            "too few pictures to train on",
            where=request.images,
            expected=f"more than {held_out}, which are held out to judge by",
            found=f"{len(usable)} that can be used",
            fix="add pictures; those that are left out are named above" if problems else "add pictures",
        )
    train, judge = split(usable, held_out)
    say(
        f"{len(train)} pictures to train on, {len(judge)} held out; {latents.encoded} encoded now, "
        f"{texts.encoded} texts, the others were in {request.cache}"
    )
    return [found[each.digest] for each in train], [found[each.digest] for each in judge], no_text


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


def _train(
    request: TrainRequest,
    base: Base,
    device: torch.device,
    precision: Precision,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    no_text: Text,
    left_out: int,
    say: Say,
    quiet: bool,
) -> Trained:
    prefix = "unet." if request.supir is None else ""
    network = load(lambda: _network(request, base), base.tensors, device, prefix=prefix, precision=precision)
    unet = _unet_of(network)
    if request.checkpointing:
        checkpoint_blocks(network)
    torch.manual_seed(request.seed)
    add_lora(unet, layers_of(unet, request.wants_layer), rank=request.rank, alpha=request.alpha)
    factors = factors_of(unet)
    half = precision == "bf16"
    controlled = request.supir is not None
    objective = Objective(
        _as_network(network),
        list(factors.values()),
        samples,
        held_out,
        no_text,
        device,
        batch=request.batch,
        at_once=request.at_once,
        seed=request.seed,
        no_text_share=request.no_text_share,
        frobenius=request.frobenius,
        controlled=controlled,
        half=half,
    )
    files = {file.name: hash_file(file) for checkpoint in base.checkpoints for file in checkpoint.files}
    fingerprint = {
        **request.settings(),
        "--precision": precision,
        "checkpoints": files,
        "pictures and captions": _digest([*samples, *held_out]),
    }
    look = None
    if request.samples:  # the LoRA still changes nothing: the state is read below
        decoder = load(lambda: VaeDecoderGraph(base.arch.vae), base.tensors, device)
        sampler = Sampler(_as_network(network), decoder, device, request.seed, controlled, half)
        shown = held_out[:SHOWN]
        without = [sampler.run(item, number) for number, item in enumerate(shown)]

        def look(step: int) -> None:
            draw_samples(sampler, shown, without, request.work / SAMPLES / f"{step:06d}.png")

    before = objective.held_out_loss()
    recipe = Recipe(
        request.name,
        request.steps,
        constant_after_warm_up(request.learning_rate, request.warm_up),
        ema=request.ema,
        save_every_s=SAVE_EVERY_S,
        fingerprint=fingerprint,
    )
    log = request.work / LOG
    trainer = Trainer(factors, recipe, log, request.work / STATE)
    first = trainer.progress.step
    if first > request.steps:
        raise TrainingError(
            "more steps are done than were asked for",
            where=request.work / STATE,
            expected=f"--steps {first} or more",
            found=f"--steps {request.steps}",
            fix="choose another --work to begin again",
        )
    if first:
        say(f"going on at step {first} of {request.steps}, from {request.work / STATE}")
    else:
        log.unlink(missing_ok=True)
        trainer.log({"held out": round(before, 6)})
    losses = [before]

    def after_step(step: int) -> None:
        if step % request.every and step != request.steps:
            return
        with trainer.averaged():
            losses.append(objective.held_out_loss())
            if look is not None:
                look(step)
        trainer.log({"held out": round(losses[-1], 6)})
        draw_losses([log], request.work / CURVES)

    trainer.run(objective.losses_at, after_step=after_step, quiet=quiet)
    trainer.save_state()  # more steps may be wanted later
    with trainer.averaged():
        after = losses[-1] if len(losses) > 1 else objective.held_out_loss()
        arrays = {name: value.detach().cpu().numpy() for name, value in factors.items()}
        write_lora(
            request.output,
            arrays,
            alpha=request.alpha,
            form=request.form,
            provenance={**fingerprint, "steps": request.steps, "trained on": len(samples), "held out": len(held_out)},
        )
    draw_losses([log], request.work / CURVES)
    return Trained(
        request.output,
        request.work / CURVES,
        len(samples),
        len(held_out),
        left_out,
        request.steps,
        request.steps - first,
        before,
        after,
    )


def _digest(samples: Sequence[Sample]) -> str:
    names: list[Any] = [(sample.file.name, sample.text.file.name) for sample in samples]
    return hashlib.sha256(repr(names).encode()).hexdigest()[:16]
