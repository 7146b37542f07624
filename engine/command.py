"""Restore photos.

python -m engine.restore photo.jpg                       writes photo.restored.png beside it
python -m engine.restore photos/ -o out/ --upscale 2     every image of a folder
python -m engine.restore photo.jpg --like other.png      with the settings that made other.png
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine import Restored, Restorer
from engine.backends import BACKENDS, MAX_THREADS
from engine.bundle import default_bundle_dir
from engine.errors import ImageError, OutputError, RestoreError, UsageError, from_os_error
from engine.host_memory import peak_memory_bytes
from engine.imageio import READ_SUFFIXES, check_output, list_images, read_history, read_photo, write_photo
from engine.options import add_settings, gibibytes, given_settings, path_option, whole_number
from engine.photo import Photo
from engine.settings import Settings
from engine.size_plan import SizePlan

#: Marks a result that lies beside its photo.
_RESULT = ".restored"


@dataclass(frozen=True)
class Job:
    """A photo, and the seeds and files of its results."""

    photo: Path
    outputs: tuple[tuple[int, Path], ...]


def restore(arguments: Sequence[str]) -> int:
    """Run the command; raises RestoreError where nothing can be done."""
    options = _parser().parse_args(arguments)
    changes, made_with = _changes(options)
    photos = _photos(options.images)
    _check_folder(options.output)
    with Restorer.open(
        options.bundle or default_bundle_dir(),
        backend=options.backend,
        device=options.device,
        threads=options.threads,
        vram_budget_gib=options.vram_budget,
    ) as restorer:
        settings = restorer.defaults.updated(changes)
        if made_with is not None and made_with != restorer.bundle.digest:
            _warn(f"{options.like} was made with another bundle: the result will differ")
        if restorer.bundle.manifest.notice and not options.quiet:
            print(f"note: {restorer.bundle.manifest.notice}", file=sys.stderr)
        _warn_of_idle_options(options, settings)
        jobs = _jobs(photos, options, settings.seed)
        reports, failures = [], []
        steps = settings.steps * sum(len(job.outputs) for job in jobs)
        with tqdm(total=steps, unit="step", disable=options.quiet, file=sys.stderr) as bar:
            restorer.on_tile = lambda stage, done, total: bar.set_postfix_str(f"{stage} {done}/{total}")
            restorer.on_note = lambda line: bar.write(f"note: {line}", file=sys.stderr)
            for job in jobs:
                bar.set_description_str(job.photo.name)
                try:
                    reports += _run(job, restorer, settings, options, bar)
                except RestoreError as error:
                    if str(job.photo) not in str(error):
                        error = error.at(job.photo)
                    if len(jobs) == 1:
                        bar.leave = False  # half a bar says nothing beside the error
                        raise error from None
                    failures.append(error)
                    bar.write(f"error: {error}", file=sys.stderr)
    if options.json:
        print(json.dumps(reports, indent=1))
    elif not options.quiet:
        for report in reports:
            print(f"{report['output']}  ({report['total_ms'] / 1e3:.1f} s, seed {report['settings']['seed']})")
    if failures:
        raise RestoreError(f"{len(failures)} of {len(jobs)} photos could not be restored", fix="see above")
    return 0


def _run(
    job: Job, restorer: Restorer, settings: Settings, options: argparse.Namespace, bar: Any
) -> list[dict[str, Any]]:
    photo = read_photo(job.photo)
    for remark in photo.remarks:
        bar.write(f"note: {job.photo}: {remark}", file=sys.stderr)
    if _is_folder(options.output):
        _make_folder(options.output)
    for _, output in job.outputs:
        check_output(output, photo, overwrite=options.overwrite)
    size = restorer.working_size(photo, settings)
    plan = restorer.size_plan(size, settings)
    memory = restorer.gpu_memory(size, settings)
    if plan != SizePlan() and not options.quiet:
        bar.write(f"{job.photo}: {size[0]} × {size[1]} is {plan}", file=sys.stderr)
    if memory is not None and not options.quiet:
        bar.write(f"{job.photo}: {size[0]} × {size[1]} {memory['text']}", file=sys.stderr)
    reports = []
    for seed, output in job.outputs:
        result = restorer.restore(photo, on_step=lambda _: bar.update(), **{**settings.model_dump(), "seed": seed})
        write_photo(output, result.photo, result.history, overwrite=options.overwrite)
        reports.append({**_report(job.photo, output, photo, result), "gpu_memory": memory})
    return reports


def _report(source: Path, output: Path, photo: Photo, result: Restored) -> dict[str, Any]:
    return {
        "input": str(source),
        "input_size": photo.size,
        "output": str(output),
        "output_size": result.photo.size,
        **result.history,
        "graphs_ms": _rounded(result.timings.graphs_ms),
        "outside_ms": _rounded(result.timings.outside_ms),
        "device_ms": _rounded(result.timings.device_ms),
        "total_ms": round(result.timings.total_ms, 1),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _rounded(stages_ms: dict[str, float]) -> dict[str, float]:
    return {stage: round(value, 1) for stage, value in stages_ms.items()}


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


# -- what to do -----------------------------------------------------------------------------------


def _changes(options: argparse.Namespace) -> tuple[dict[str, Any], str | None]:
    """Return the settings that differ from the bundle's, and the bundle that `--like` was made with."""
    given = given_settings(options)
    if options.like is None:
        return given, None
    history = read_history(options.like)
    settings, bundle = history.get("settings"), history.get("bundle")
    if not isinstance(settings, dict) or not isinstance(bundle, dict):
        raise ImageError("holds no settings", where=options.like, expected="a result of this engine")
    return {**settings, **given}, str(bundle.get("digest"))


def _warn_of_idle_options(options: argparse.Namespace, settings: Settings) -> None:
    for option, sampler in (("churn", "edm"), ("eta", "dpmpp2m")):
        if getattr(options, option) is not None and settings.sampler != sampler:
            _warn(f"--{option} does nothing with --sampler {settings.sampler}")


def _photos(names: Sequence[Path]) -> list[Path]:
    photos: list[Path] = []
    for name in names:
        if name.is_dir():
            # Results of an earlier run lie beside their photos.
            found = [path for path in list_images(name) if _RESULT not in path.suffixes]
            if not found:
                raise ImageError("holds no images", where=name, expected=", ".join(READ_SUFFIXES))
            photos += found
        elif name.exists():
            photos.append(name)
        else:
            raise ImageError("no such file", where=name, fix="check the path")
    return list(dict.fromkeys(photos))


def _jobs(photos: Sequence[Path], options: argparse.Namespace, seed: int) -> list[Job]:
    """Return what to restore into which files, all of them checked before any work.

    Raises:
        OutputError: a file could not be written, or two results would have one name.
    """
    place = _placer(photos, options)
    folder_to_come = _is_folder(options.output) and not options.output.exists()
    jobs = []
    taken: dict[Path, Path] = {}
    inputs = {photo.resolve(): photo for photo in photos}
    for photo in photos:
        outputs = []
        for index in range(options.samples):
            output = place(photo)
            if options.samples > 1:
                output = output.with_name(f"{output.stem}.{seed + index}{output.suffix}")
            if output.resolve() in inputs:
                raise OutputError("would replace a photo", where=output, fix="choose another name with -o")
            if output in taken:
                raise OutputError(
                    "two photos would be restored into one file",
                    where=output,
                    found=f"{taken[output]} and {photo}",
                    fix="restore them into different folders",
                )
            taken[output] = photo
            if options.skip_existing and output.is_file():
                continue
            if not folder_to_come:
                check_output(output, overwrite=options.overwrite)
            outputs.append((seed + index, output))
        if outputs:
            jobs.append(Job(photo, tuple(outputs)))
    return jobs


def _placer(photos: Sequence[Path], options: argparse.Namespace) -> Callable[[Path], Path]:
    """Return the function from a photo to its result's place."""
    target: Path | None = options.output
    if target is not None and not _is_folder(target):
        if len(photos) > 1:
            raise UsageError("several photos need a folder", where="-o", found=target)
        return lambda photo: target
    # A camera's JPEG beside the PNG made from it: then each keeps its whole name.
    places = Counter((photo.parent if target is None else target, photo.stem) for photo in photos)

    def place(photo: Path) -> Path:
        folder = photo.parent if target is None else target
        stem = photo.stem if places[folder, photo.stem] == 1 else photo.name
        return folder / (f"{stem}{_RESULT}.png" if target is None else f"{stem}.png")

    return place


def _is_folder(target: Path | None) -> bool:
    """Tell whether `-o` names a folder: one that is there, or a name without an ending."""
    return target is not None and (target.is_dir() or not target.suffix)


def _check_folder(target: Path | None) -> None:
    """Find out, before the work, whether the folder of `-o` is there or could be made."""
    if target is None or not _is_folder(target) or target.is_dir():
        return
    if os.path.lexists(target):
        raise OutputError("is no folder", where=target, fix="name a folder, or a file with an ending such as .png")
    if not target.parent.is_dir():
        raise OutputError("no such folder", where=target.parent, fix="create it first")


def _make_folder(target: Path) -> None:
    try:
        target.mkdir(exist_ok=True)
    except OSError as error:
        raise from_os_error(error, target, "create the folder") from error


def _parser() -> argparse.ArgumentParser:
    defaults = "Defaults are the bundle's. --like takes another result's settings; options override them."
    parser = argparse.ArgumentParser(
        prog="python -m engine.restore",
        allow_abbrev=False,
        description=__doc__,
        epilog=defaults,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images",
        type=path_option,
        nargs="+",
        metavar="IMG",
        help="images, or folders of images (subfolders are left out)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=path_option,
        metavar="FILE|DIR",
        help="default: IMG.restored.png beside IMG; a name without an ending is a folder, for PNGs",
    )
    present = parser.add_mutually_exclusive_group()
    present.add_argument("--overwrite", action="store_true", help="replace results that exist")
    present.add_argument("--skip-existing", action="store_true", help="leave out what has a result already")
    parser.add_argument("--like", type=path_option, metavar="RESULT", help="use the settings that RESULT was made with")
    parser.add_argument(
        "--samples", type=whole_number(1, 1000), default=1, metavar="N", help="results per photo, from successive seeds"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--bundle", type=path_option, metavar="DIR", help=f"default: {default_bundle_dir()}")
    engine.add_argument("--backend", choices=BACKENDS, help="default: the one that the bundle was built for")
    engine.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="cpu, cuda or cuda:N; default: the CPU for onnxruntime, else the first GPU",
    )
    engine.add_argument(
        "--vram-budget",
        type=gibibytes,
        metavar="GIB",
        help="GPU memory that may be used; networks that do not fit are loaded and released by stage, which is slower",
    )
    engine.add_argument(
        "--threads",
        type=whole_number(0, MAX_THREADS, " (one per core)"),
        default=0,
        metavar="N",
        help="CPU threads; default: one per core, and more than that only slows it down",
    )
    engine.add_argument("--quiet", action="store_true", help="no progress bar, no list of results")
    engine.add_argument(
        "--json", action="store_true", help="print settings, seed, milliseconds per stage and memory as JSON"
    )
    add_settings(parser)
    return parser
