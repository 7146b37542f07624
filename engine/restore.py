"""Restore photos.

python -m engine.restore photo.jpg                       writes photo.restored.png beside it
python -m engine.restore photos/ -o out/ --upscale 2     every image of a folder
python -m engine.restore photo.jpg --like other.png      with the settings that made other.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine import Restored, Restorer
from engine.backends import BACKENDS
from engine.bundle import default_bundle_dir
from engine.console import peak_memory_bytes, run_command
from engine.errors import ImageError, OutputError, RestoreError, UsageError, from_os_error
from engine.imageio import Photo, check_output, list_images, read_history, read_photo, write_photo
from engine.settings import QUALITY_WORDS, Settings, parse_scale

#: Options that are settings, by the settings' names.
_SETTINGS = (
    "upscale",
    "min_size",
    "prompt",
    "quality_words",
    "negative_prompt",
    "steps",
    "sampler",
    "cfg_scale",
    "control_scale",
    "restore_pull",
    "churn",
    "s_noise",
    "eta",
    "seed",
    "color_fix",
)


@dataclass(frozen=True)
class Job:
    """A photo, and the seeds and files of its results."""

    photo: Path
    outputs: tuple[tuple[int, Path], ...]


def main(arguments: Sequence[str]) -> int:
    """Run the command; raises RestoreError where nothing can be done."""
    options = _parser().parse_args(arguments)
    changes, made_with = _changes(options)
    photos = _photos(options.images)
    restorer = Restorer.open(options.bundle or default_bundle_dir(), backend=options.backend, threads=options.threads)
    settings = restorer.defaults.updated(changes)
    if made_with is not None and made_with != restorer.bundle.digest:
        _warn(f"{options.like} was made with another bundle: the result will differ")
    if restorer.bundle.manifest.notice and not options.quiet:
        print(f"note: {restorer.bundle.manifest.notice}", file=sys.stderr)
    jobs = _jobs(photos, options, settings.seed)
    reports, failures = [], []
    steps = settings.steps * sum(len(job.outputs) for job in jobs)
    with tqdm(total=steps, unit="step", disable=options.quiet, file=sys.stderr) as bar:
        for job in jobs:
            bar.set_description_str(job.photo.name)
            try:
                reports += _run(job, restorer, settings, options, bar)
            except RestoreError as error:
                if len(jobs) == 1:
                    raise
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
    for _, output in job.outputs:
        check_output(output, photo, overwrite=options.overwrite)
    reports = []
    for seed, output in job.outputs:
        result = restorer.restore(photo, on_step=lambda _: bar.update(), **{**settings.model_dump(), "seed": seed})
        write_photo(output, result.photo, result.history, overwrite=options.overwrite)
        reports.append(_report(job.photo, output, photo, result))
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
    given = {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}
    if options.no_restore_pull:
        given["restore_pull"] = None
    if options.like is None:
        return given, None
    history = read_history(options.like)
    settings, bundle = history.get("settings"), history.get("bundle")
    if not isinstance(settings, dict) or not isinstance(bundle, dict):
        raise ImageError("holds no settings", where=options.like, expected="a result of this engine")
    return {**settings, **given}, str(bundle.get("digest"))


def _photos(names: Sequence[Path]) -> list[Path]:
    photos: list[Path] = []
    for name in names:
        if name.is_dir():
            found = list_images(name)
            if not found:
                raise ImageError("holds no images", where=name)
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
    jobs = []
    taken: dict[Path, Path] = {}
    for photo in photos:
        outputs = []
        for index in range(options.samples):
            output = place(photo)
            if options.samples > 1:
                output = output.with_name(f"{output.stem}.{seed + index}{output.suffix}")
            check_output(output, overwrite=options.overwrite)
            if output.resolve() == photo.resolve():
                raise OutputError("would replace the photo itself", where=output, fix="choose another name with -o")
            if output in taken:
                raise OutputError(
                    "two photos would be restored into one file",
                    where=output,
                    found=f"{taken[output]} and {photo}",
                    fix="restore them into different folders",
                )
            taken[output] = photo
            outputs.append((seed + index, output))
        jobs.append(Job(photo, tuple(outputs)))
    return jobs


def _placer(photos: Sequence[Path], options: argparse.Namespace) -> Callable[[Path], Path]:
    """Return the function from a photo to its result's place."""
    target: Path | None = options.output
    if target is None:
        return lambda photo: photo.with_name(f"{photo.stem}.restored.png")
    if target.suffix and not target.is_dir():
        if len(photos) > 1:
            raise UsageError("several photos need a folder", where="-o", found=target)
        return lambda photo: target
    try:
        target.mkdir(exist_ok=True)
    except OSError as error:
        raise from_os_error(error, target, "create the folder") from error
    return lambda photo: target / f"{photo.stem}.png"


def _parser() -> argparse.ArgumentParser:
    defaults = "Defaults are the bundle's. --like takes another result's settings; options override them."
    parser = argparse.ArgumentParser(
        prog="python -m engine.restore",
        description=__doc__,
        epilog=defaults,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", type=Path, nargs="+", metavar="IMG", help="images, or folders of images")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE|DIR", help="default: IMG.restored.png beside IMG")
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist")
    parser.add_argument("--like", type=Path, metavar="RESULT", help="use the settings that RESULT was made with")
    parser.add_argument(
        "--samples", type=_count, default=1, metavar="N", help="results per photo, from successive seeds"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--bundle", type=Path, metavar="DIR", help=f"default: {default_bundle_dir()}")
    engine.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help="default: %(default)s")
    engine.add_argument("--threads", type=_threads, default=0, metavar="N", help="CPU threads; default: one per core")
    engine.add_argument("--quiet", action="store_true", help="no progress bar, no list of results")
    engine.add_argument(
        "--json", action="store_true", help="print settings, seed, milliseconds per stage and peak memory as JSON"
    )
    _add_settings(parser)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    size = parser.add_argument_group("size")
    size.add_argument("--upscale", type=float, metavar="X", help="size of the result over the photo's")
    size.add_argument(
        "--min-size", type=int, metavar="PX", help="work at least at this shorter side; the result's size stays"
    )
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", metavar="TEXT", help="what the photo shows; of any length")
    text.add_argument("--quality-words", metavar="TEXT", help=f'appended to the prompt; default: "{QUALITY_WORDS}"')
    text.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--steps", type=int, metavar="N")
    sampling.add_argument("--sampler", choices=("edm", "dpmpp2m"), help="RestoreEDM or RestoreDPM++2M")
    sampling.add_argument(
        "--cfg-scale",
        type=parse_scale,
        metavar="S[:END]",
        help="guidance s, from the first step to the last; 1 turns it off; the paper's lambda is s - 1",
    )
    sampling.add_argument(
        "--control-scale", type=parse_scale, metavar="S[:END]", help="how strongly the photo steers the sampling"
    )
    pull = sampling.add_mutually_exclusive_group()
    pull.add_argument(
        "--restore-pull", type=float, metavar="R", help="pull towards the stage-1 image, fading as (sigma/max)^R"
    )
    pull.add_argument("--no-restore-pull", action="store_true", help="switch the pull off, if the bundle has it on")
    sampling.add_argument("--churn", type=float, metavar="C", help="noise added back over the run (edm)")
    sampling.add_argument("--s-noise", type=float, metavar="S", help="std of the noise added while sampling")
    sampling.add_argument("--eta", type=float, metavar="E", help="0 is deterministic, 1 the SDE (dpmpp2m)")
    sampling.add_argument("--seed", type=int, metavar="N", help="of the noise; the same seed gives the same result")
    sampling.add_argument("--color-fix", choices=("wavelet", "adain", "none"), help="take the colours of stage 1")


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 1000:
        raise argparse.ArgumentTypeError("expected 1 to 1000")
    return number


def _threads(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 1024:
        raise argparse.ArgumentTypeError("expected 0 (one per core) to 1024")
    return number


if __name__ == "__main__":
    sys.exit(run_command(main))
