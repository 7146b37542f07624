"""Restore photos.

python -m engine.restore photo.jpg                       writes photo.restored.png beside it
python -m engine.restore photos/ -o out/ --upscale 2     every image of a folder; again: goes on where it was stopped
python -m engine.restore photos/ -o out/ --format same   in each photo's own format
python -m engine.restore photo.jpg --preset lightning-8  with other settings that the bundle has a name for
python -m engine.restore photo.jpg --like other.png      with the settings that made other.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from engine import Restorer
from engine.backends import default_backend, gpu_index
from engine.bundle.manifest import Bundle, read_manifest
from engine.bundle.storage import clean_stale_temp_files
from engine.cli.batch import BatchRunner, Outcome, ProgressListener, restore_all
from engine.cli.captions import Captioner, add_captions, as_asked, asked_of, make_captioner
from engine.cli.claims import clean_stale_claims
from engine.cli.engine_options import add_engine, engine_arguments
from engine.cli.faces import FacePass, FaceRequest, add_faces, face_request
from engine.cli.gpu_processes import ALL_GPUS, restore_on_gpus
from engine.cli.jobs import (
    PhotoJob,
    Placement,
    check_folder,
    check_options,
    find_photos,
    plan_jobs,
    raws_left_out,
)
from engine.cli.options import add_settings, command_parser, given_settings, path_option, whole_number
from engine.cli.progress import StepBar
from engine.cli.ray_cluster import gpu_is_used, restore_on_cluster
from engine.cli.report_page import ReportPage, check_page
from engine.cli.summary import RunSummary
from engine.cli.workers import WorkerConfig
from engine.errors import BackendError, ImageError, RestoreError, printable
from engine.image.files import read_provenance
from engine.image.formats import WRITTEN
from engine.image.preview import REPORT_PX
from engine.pipeline.provenance import provenance_of
from engine.settings import Settings


def restore(arguments: Sequence[str]) -> int:
    """Run the command; raises RestoreError where nothing can be done."""
    options = _parser().parse_args(arguments)
    captioner = make_captioner(options.caption, options.caption_model)
    changes, like = _changes(options)
    file_format = options.format or "png"
    placement = Placement(options.output, options.samples, options.overwrite, options.skip_existing, file_format)
    check_options(placement, options.format, options.quality)
    found = find_photos(options.images, placement, recursive=options.recursive)
    check_folder(options.output)
    faces = face_request(options, [item.photo for item in found], like)
    if options.preset is not None:  # a wrong name is told before a bundle is opened, which may take minutes
        read_manifest(options.bundle).manifest.settings(options.preset)
    if options.report is not None:
        check_page(options.report, overwrite=options.overwrite)
    gpus = _gpus_beside_each_other(options, len(found))
    with ExitStack() as opened:
        here = options.ray is None and gpus == 1
        restorer = opened.enter_context(Restorer.open(**engine_arguments(options))) if here else None
        bundle = read_manifest(options.bundle) if restorer is None else restorer.bundle
        face_pass = None
        if faces is not None and restorer is not None:
            face_pass = FacePass.open(restorer, faces, engine_arguments(options))
            opened.enter_context(face_pass.restorer)
        settings = bundle.manifest.settings(options.preset).updated(changes)
        if like is not None and like["bundle"].get("digest") != bundle.digest:
            _warn(f"{options.like} was made with another bundle: the result will differ")
        if faces is not None and faces.is_of_another_bundle(like):
            _warn(f"the faces of {options.like} were made with another bundle: they will differ")
        if bundle.manifest.notice and not options.quiet:
            print(f"note: {printable(bundle.manifest.notice)}", file=sys.stderr)
        if restorer is not None and not options.quiet and _backend_was_chosen(options, bundle):
            facts = restorer.backend_facts
            print(f"note: computed in {facts['compute']} by {facts['library']}, the fastest here", file=sys.stderr)
        _warn_of_idle_options(options, settings)
        if captioner is not None and captioner.looks and not options.quiet:
            asked = "" if captioner.model is None else f" ({captioner.model})"
            print(f"note: a small picture of each photo is sent to {captioner.source}{asked}", file=sys.stderr)
        if not options.quiet and (raws := raws_left_out(options.images, recursive=options.recursive)):
            print(f"note: camera raws in the folders were left out: {raws}; name one to restore it", file=sys.stderr)

        def provenance(seed: int) -> dict[str, Any]:
            asked = asked_of(captioner) | ({} if faces is None else faces.asked)
            return provenance_of(bundle, settings.updated({"seed": seed})) | asked

        jobs = plan_jobs(found, placement, settings.seed, provenance)
        for folder in {output.parent for job in jobs for output in (*job.done, *(output for _, output in job.outputs))}:
            clean_stale_temp_files(folder)
            clean_stale_claims(folder)
        bar = opened.enter_context(StepBar(jobs, settings.steps, quiet=options.quiet))
        page = opened.enter_context(ReportPage(options.report)) if options.report is not None else None
        tally = RunSummary()
        reports: list[dict[str, Any]] = []
        given = (settings, like, options, captioner, face_pass or faces)
        for outcome in _outcomes(jobs, restorer, gpus, bundle, *given, bar):
            if outcome.error is not None:
                if len(jobs) == 1:
                    bar.drop()
                    raise outcome.error
                bar.note(f"error: {outcome.error}")
            tally.add(outcome)
            reports += outcome.reports
            if page is not None:
                page.add(outcome)
        if page is not None:
            page.write(tally, _facts(bundle, options.preset, settings, faces))
    _print_summary(tally, reports, options)
    return 0


def _outcomes(
    jobs: Sequence[PhotoJob],
    restorer: Restorer | None,
    gpus: int,
    bundle: Bundle,
    settings: Settings,
    like: dict[str, Any] | None,
    options: argparse.Namespace,
    captioner: Captioner | None,
    faces: FacePass | FaceRequest | None,
    watch: ProgressListener,
) -> Iterator[Outcome]:
    previews = REPORT_PX if options.report is not None else 0
    chosen = options.tile is not None or options.vae_tiles is not None
    tiles = None if chosen else like  # what the command line says of tiles holds
    given = (options.overwrite, previews, tiles, options.quality, options.any_size)
    named: dict[str, Any] = {"captioner": captioner, "preset": options.preset}
    if restorer is not None:
        assert not isinstance(faces, FaceRequest), "it was opened with the restorer"
        return restore_all(jobs, BatchRunner(restorer, settings, *given, **named, faces=faces), watch)
    assert not isinstance(faces, FacePass), "workers open their own"
    engine = {**engine_arguments(options), "bundle": bundle.path.absolute()}
    absolute = None if faces is None else faces.absolute()
    config = WorkerConfig(engine, settings, *given, **named, faces=absolute)
    if options.ray is None:
        return restore_on_gpus(jobs, config, gpus, watch)
    uses_gpu = gpu_is_used(options.device, options.backend or bundle.manifest.backend)
    return restore_on_cluster(jobs, config, uses_gpu, options.ray, watch)


def _gpus_beside_each_other(options: argparse.Namespace, photos: int) -> int:
    """Return how many GPUs restore photos, each by a process of its own; with one, it is named as the device.

    Raises:
        UsageError: the backend runs on none. BackendError: there is none, or no driver.
    """
    if options.device != ALL_GPUS or options.ray is not None:
        return 1
    gpu_index(options.backend or "onnxruntime", "cuda")
    from engine.device.cuda import gpu_count

    count = gpu_count()
    if count == 0:
        raise BackendError("there is no GPU", where=f"--device {ALL_GPUS}", fix="restore on --device cpu")
    if min(count, photos) == 1:
        options.device = "cuda:0"
    return min(count, photos)


def _backend_was_chosen(options: argparse.Namespace, bundle: Bundle) -> bool:
    """Tell whether the bundle runs on another backend than it was built for though none was named."""
    return options.backend is None and default_backend(bundle.manifest, options.device) != bundle.manifest.backend


def _print_summary(tally: RunSummary, reports: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print what a run came to.

    Raises:
        RestoreError: photos failed.
    """
    if options.json:
        print(json.dumps(reports, indent=1))
    elif not options.quiet:
        for report in reports:
            took, seed = report["total_ms"] / 1e3, report["settings"]["seed"]
            print(printable(f"{report['output']}  ({took:.1f} s, seed {seed})"))
        if tally.photos > 1 or tally.kept:
            print(*map(printable, tally.lines()), sep="\n")
        if options.report is not None:
            print(printable(f"report: {options.report}"))
    if tally.failed:
        raise RestoreError(f"{len(tally.failed)} of {tally.photos} photos could not be restored", fix="see above")


def _facts(bundle: Bundle, preset: str | None, settings: Settings, faces: FaceRequest | None) -> dict[str, Any]:
    """Return what the report page says about a run."""
    named = {"bundle": bundle.manifest.name, **({} if preset is None else {"preset": preset})}
    told = {} if faces is None else {"face_words": faces.settings.words}
    return {**named, **settings.model_dump(mode="json"), **told}


def _warn(text: str) -> None:
    print(printable(f"warning: {text}"), file=sys.stderr)


# -- what to do -----------------------------------------------------------------------------------


def _changes(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the settings that differ from the bundle's, and the metadata of the result that `--like` names."""
    given = given_settings(options)
    if options.like is None:
        return given, None
    provenance = read_provenance(options.like)
    if options.caption != "none":  # which brings its own words
        provenance = as_asked(provenance)
    settings, bundle = provenance.get("settings"), provenance.get("bundle")
    if not isinstance(settings, dict) or not isinstance(bundle, dict):
        raise ImageError("holds no settings", where=options.like, expected="a result of this engine")
    return {**settings, **given}, provenance


def _warn_of_idle_options(options: argparse.Namespace, settings: Settings) -> None:
    for option, sampler in (("churn", "edm"), ("eta", "dpmpp2m")):
        if getattr(options, option) is not None and settings.sampler != sampler:
            _warn(f"--{option} does nothing with --sampler {settings.sampler}")


def _parser() -> argparse.ArgumentParser:
    defaults = "Defaults are the bundle's. --preset and --like take other settings; options override them."
    parser = command_parser("python -m engine.restore", __doc__, epilog=defaults)
    parser.add_argument(
        "images",
        type=path_option,
        nargs="+",
        metavar="IMG",
        help="images, or folders of images",
    )
    parser.add_argument("--recursive", action="store_true", help="look into subfolders, which -o gets too")
    parser.add_argument(
        "-o",
        "--output",
        type=path_option,
        metavar="FILE|DIR",
        help="default: IMG.restored.png beside IMG; a name without an ending is a folder",
    )
    parser.add_argument(
        "--format",
        choices=(*WRITTEN, "same"),
        help="of results whose file is not named; same is each photo's own, or PNG; default: png",
    )
    parser.add_argument(
        "--quality",
        type=whole_number(1, 100),
        metavar="N",
        help="of JPEG, WebP and AVIF, 1 to 100; default: 95, and 90 for AVIF",
    )
    parser.add_argument(
        "--any-size",
        action="store_true",
        help="read photos whatever memory their size takes; else those that cannot fit are refused",
    )
    present = parser.add_mutually_exclusive_group()
    present.add_argument("--overwrite", action="store_true", help="replace results that exist")
    present.add_argument("--skip-existing", action="store_true", help="keep results that exist, whatever made them")
    parser.add_argument(
        "--report", type=path_option, metavar="FILE.html", help="write a page with every photo before and after"
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="restore on a Ray cluster, whose machines have the same folders: auto, HOST:PORT, or local for a new one",
    )
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--preset", metavar="NAME", help="use settings that the bundle has a name for")
    others.add_argument("--like", type=path_option, metavar="RESULT", help="use the settings that RESULT was made with")
    parser.add_argument(
        "--samples", type=whole_number(1, 1000), default=1, metavar="N", help="results per photo, from successive seeds"
    )
    engine = add_engine(parser)
    engine.add_argument("--quiet", action="store_true", help="no progress bar, no list of results")
    engine.add_argument(
        "--json", action="store_true", help="print settings, seed, milliseconds per stage and memory as JSON"
    )
    add_settings(parser)
    add_captions(parser)
    add_faces(parser)
    return parser
