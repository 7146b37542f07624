"""Everything before the first step: the command's files and machine checked, pictures encoded and divided."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from engine.cli.captions import Captioner, CaptionError
from engine.errors import DoesNotFitError, ImageError, OutputError, RestoreError, UsageError, from_os_error
from engine.image.photo import Pixels
from export.training.dataset import Crop, Picture, caption_of, load_cut, require_captions, split, told
from export.training.encode import LatentCache, Sample, Text, TextCache
from export.training.loop import TrainingError
from export.training.networks import Base
from export.training.precision import Precision, has_bf16
from export.training.request import TrainRequest


@dataclass(frozen=True)
class Reporter:
    """Who is told how a training goes.

    Attributes:
        say: told what a person should know, a line each.
        quiet: no progress bars.
    """

    say: Callable[[str], None] = lambda line: None
    quiet: bool = False


@dataclass(frozen=True)
class Machine:
    """Where networks run, and in which types: see `stored_type`."""

    device: torch.device
    precision: Precision

    @property
    def half(self) -> bool:
        """Whether products are in bfloat16."""
        return self.precision == "bf16"


@dataclass(frozen=True)
class Dataset:
    """Encoded pictures.

    Attributes:
        samples: to train on. held_out: to judge by.
        no_text: what a picture without words has.
        left_out: how many files could not be used.
    """

    samples: Sequence[Sample]
    held_out: Sequence[Sample]
    no_text: Text
    left_out: int


def check_output(request: TrainRequest) -> None:
    """Find out, before the work, whether the LoRA could be written.

    Raises:
        UsageError, OutputError: it could not.
    """
    output = request.output
    if output.suffix != ".safetensors":
        raise UsageError("a LoRA is a .safetensors file", where="--output", found=output)
    if os.path.lexists(output) and (output.is_dir() or not request.overwrite):
        raise OutputError("exists already", where=output, fix="choose another --output, or allow it with --overwrite")
    if not output.parent.is_dir():
        raise OutputError("no such folder", where=output.parent, fix="create it first")
    if not os.access(output.parent, os.W_OK):
        raise OutputError("no permission to write there", where=output.parent, fix="choose another place")


def machine_of(request: TrainRequest) -> Machine:
    """Return where a training runs.

    Raises:
        UsageError: there is no such device, or it does not compute in bf16.
    """
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
    if request.precision == "bf16" and not has_bf16(device):
        fix = "use --precision fp32"
        raise UsageError("this device does not compute in bf16", where="--precision", found=device, fix=fix)
    return Machine(device, request.precision or ("bf16" if has_bf16(device) else "fp32"))


@contextmanager
def training_folder(folder: Path, *inside: str) -> Iterator[None]:
    """Make a training's folder, and keep other trainings out of it meanwhile.

    Args:
        folder: that is made.
        inside: names of folders in it.
    Raises:
        TrainingError: another one is under way.
        OutputError: it cannot be made.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        for name in inside:
            (folder / name).mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise TrainingError(
            "another training is under way here", where=folder, fix="wait for it, or choose another --work"
        ) from None
    except OSError as error:
        raise from_os_error(error, folder, "make the training's folder") from error
    try:
        yield
    finally:
        lock.release()


def encode_pictures(
    request: TrainRequest,
    base: Base,
    device: torch.device,
    captioner: Captioner | None,
    found: tuple[Sequence[Picture], Sequence[RestoreError]],
    reporter: Reporter,
) -> Dataset:
    """Return pictures with their latents and texts, divided; what is known from another run is not computed.

    Args:
        request: what the user asked for.
        base: whose networks encode.
        device: that encodes.
        captioner: who describes them; None for no words.
        found: pictures, and what is wrong with others, from `find_pictures`.
        reporter: told which are left out.
    Raises:
        CaptionError: captions are missing.
        ImageError: too few pictures are left.
        OutputError: the cache cannot be written.
    """
    pictures, problems = found[0], list(found[1])
    total = len(pictures) + len(problems)
    crop = Crop(request.size_px, request.buckets)
    latents = LatentCache(base, crop, request.cache, device, degraded=request.supir is not None)
    texts = TextCache(base, request.cache, device)
    no_text = texts.text("")
    usable: list[Picture] = []
    samples: dict[str, Sample] = {}
    mute: list[tuple[Path, CaptionError]] = []

    def cut(picture: Picture) -> Pixels:
        return load_cut(picture, crop)

    for picture in tqdm(pictures, desc="latents", disable=reporter.quiet, mininterval=1):
        try:
            sample = latents.sample(picture, cut, no_text)
            caption = "" if captioner is None else caption_of(picture, captioner, cut, request.cache)
        except CaptionError as error:
            mute.append((picture.path, error))
        except (ImageError, DoesNotFitError) as error:
            problems.append(error)
        else:
            usable.append(picture)
            samples[picture.digest] = replace(sample, text=texts.text(caption))
    for line in told(problems, total):
        reporter.say(line)
    require_captions(mute, total)
    held_out = request.held_out or min(100, max(1, len(usable) // 10))
    if len(usable) <= held_out:
        raise ImageError(
            "too few pictures to train on",
            where=request.images,
            expected=f"more than {held_out}, which are held out to judge by",
            found=f"{len(usable)} that can be used",
            fix="add pictures; those that are left out are named above" if problems else "add pictures",
        )
    train, judge = ([samples[picture.digest] for picture in part] for part in split(usable, held_out))
    reporter.say(
        f"{len(train)} pictures to train on, {len(judge)} held out; {latents.encoded} encoded now, "
        f"{texts.encoded} texts, the others were in {request.cache}"
    )
    return Dataset(train, judge, no_text, len(problems))
