"""How long a restoration takes and why: the engine by stage, against the floor and against PyTorch.

    python benchmarks/latency.py --baseline torch --size 256 512 --json latency.json --plot latency.png

Every combination of --size, --batch, --steps and --cfg is measured. Each runtime is a process of its
own, so its peak memory and its cold start are its own. They take turns, restoration by restoration, so
that what else the machine does falls on all. The first restorations are warm-up and not counted: they
open the graphs, or compile them. Figures are medians. FLOPs are counted over the bundle's networks; the
floor is what they take at the device's matrix rate in the precision that they are computed in, which is
measured after each combination; the fastest counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import paper
from benchmarks.machine import describe_machine
from benchmarks.matrix_rate import MatrixRate, given_rate, measure_rate
from benchmarks.plot import check_matplotlib, draw
from benchmarks.report import to_markdown
from benchmarks.runtimes import BASELINES, ENGINE, Configuration, RepeatCounts, RunSetup, measure
from benchmarks.stages import UNET, Launch
from benchmarks.summary import summarize, works_of
from engine.backends import BACKENDS, default_backend, gpu_index
from engine.backends.ov_library import COMPUTES
from engine.bundle.graphspec import Precision
from engine.bundle.manifest import Bundle, default_bundle_dir, open_bundle
from engine.cli.console import run_command
from engine.cli.options import command_parser
from engine.errors import BackendError, UsageError
from engine.sampling.guidance import is_unguided

if TYPE_CHECKING:
    from benchmarks.flops import WorkCounter


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = _parser().parse_args(arguments)
    if options.plot:
        check_matplotlib()
    if importlib.util.find_spec("torch") is None:
        raise BackendError("FLOPs are counted with torch, which is not installed", fix="pip install -e '.[export]'")
    bundle = open_bundle(options.bundle or default_bundle_dir())  # said before several processes say it
    backend = options.backend or default_backend(bundle.manifest, options.device)
    gpu = gpu_index(backend, options.device)
    setup = RunSetup(bundle.path, backend, gpu, options.threads, options.vram_budget, options.compute)
    grid = [
        Configuration(size, batch, steps, cfg == "on")
        for size, batch, steps, cfg in itertools.product(options.size, options.batch, options.steps, options.cfg)
    ]
    _check(grid, bundle)
    runtimes = [ENGINE, *dict.fromkeys(options.baseline)]
    counts = RepeatCounts(options.warmup, options.repeats)
    counters = _counters(bundle, gpu)  # before a long run, which a mistake in it would lose
    rate: MatrixRate | None = None
    measured: list[tuple[Configuration, dict[str, dict[str, Any]]]] = []
    try:
        for configuration in grid:
            found = measure(runtimes, setup, configuration, counts, quiet=options.quiet)
            measured.append((configuration, found))
            # A shared machine, or a GPU that has warmed up, has another speed each time; a floor is the fastest.
            again = _matrix_rate(bundle, setup, options.matrix_tflops, [each["computed_in"] for each in found.values()])
            rate = again if rate is None else rate.or_faster(again)
    finally:  # an error at one size is no reason to lose the others
        if rate is not None:
            _write(_report(bundle, setup, counts, rate, counters, measured), options)
    return 0


def _check(grid: Sequence[Configuration], bundle: Bundle) -> None:
    for size in dict.fromkeys(configuration.size_px for configuration in grid):
        if size % bundle.size_multiple:
            raise UsageError(
                "the networks cannot take that size",
                where="--size",
                expected=f"a multiple of {bundle.size_multiple}",
                found=size,
            )
    scale = bundle.manifest.defaults.cfg_scale
    if any(configuration.cfg for configuration in grid) and all(is_unguided(end) for end in scale):
        raise UsageError(
            "the bundle's own settings do not guide",
            where="--cfg on",
            expected="a cfg_scale other than 1",
            found=f"{scale.start:g}:{scale.end:g}",
            fix="measure with --cfg off",
        )


def _matrix_rate(
    bundle: Bundle,
    setup: RunSetup,
    given_tflops: float | None,
    computed_in: Sequence[Mapping[str, Precision] | None],
) -> MatrixRate:
    """Return the device's rates in what the runtimes compute in: as they tell it, or as graphs are written."""
    written = {name: graph.spec.precision for name, graph in bundle.manifest.graphs.items()}
    used = [written if told is None else told for told in computed_in]
    precisions: list[Precision] = list(dict.fromkeys(itertools.chain.from_iterable(each.values() for each in used)))
    if setup.gpu is not None and "fp16" in precisions:
        precisions.append("bf16")  # a baseline's VAE
    if given_tflops is not None:
        return given_rate(given_tflops, precisions)
    # In a process of its own, which gives its memory back.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_rate, precisions, setup.gpu, setup.threads).result()


def _counters(bundle: Bundle, gpu: int | None) -> Callable[[str], WorkCounter]:
    """Return what gives a runtime's counter of FLOPs, by the runtime's name."""
    from benchmarks.flops import WorkCounter
    from benchmarks.networks import bundle_builders
    from benchmarks.torch_backend import baseline_vae_precision

    engine = WorkCounter(bundle_builders(bundle))
    baseline = WorkCounter(bundle_builders(bundle, vae_precision=baseline_vae_precision(bundle, gpu)))
    return lambda runtime: baseline if runtime.startswith("torch") else engine


def _report(
    bundle: Bundle,
    setup: RunSetup,
    counts: RepeatCounts,
    rate: MatrixRate,
    counters: Callable[[str], WorkCounter],
    measured: Sequence[tuple[Configuration, dict[str, dict[str, Any]]]],
) -> dict[str, Any]:
    results = []
    for configuration, runtimes in measured:
        figures = {}
        for name, runtime in runtimes.items():
            launches = [Launch(**launch) for launch in runtime["launches"]]
            works = works_of(launches, counters(name), runtime["computed_in"])
            figures[name] = summarize(runtime, works, rate.tflops, configuration.batch)
        steps = [launch for launch in launches if launch.graph == UNET]
        tiles = sum(launch.count for launch in steps) // configuration.steps
        guided = sum(launch.count for launch in steps if launch.symbols["B"] > configuration.batch) // tiles
        results.append(
            {
                "configuration": str(configuration),
                **asdict(configuration),
                "guided_steps": guided,
                "tiles": tiles,
                "text_chunks": steps[0].symbols["k"],
                "launches": [asdict(launch) for launch in launches],
                "runtimes": figures,
            }
        )
    return {
        "machine": describe_machine(),
        "gpu": measured[0][1][ENGINE]["gpu"],
        "bundle": {
            "name": bundle.manifest.name,
            "digest": bundle.digest,
            "precision": bundle.manifest.precision,
            "vae_precision": bundle.spec("vae_decoder").precision,
            "parameters_bytes": bundle.manifest.weights.bytes,
        },
        "backend": setup.backend,
        "compute": setup.compute,
        "threads": setup.threads,
        "vram_budget_gib": setup.vram_budget_gib,
        **asdict(counts),
        "floor": asdict(rate),
        "paper_table_3_seconds": paper.TABLE_3,
        "results": results,
    }


def _write(report: dict[str, Any], options: argparse.Namespace) -> None:
    print(to_markdown(report))
    for file in (options.json, options.plot):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        draw(report, options.plot)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python benchmarks/latency.py", __doc__)
    parser.add_argument("--bundle", type=Path, metavar="DIR", help=f"default: {default_bundle_dir()}")
    parser.add_argument("--backend", choices=BACKENDS, help="default: the one that the bundle was built for")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda or cuda:N; by default as python -m engine.restore"
    )
    parser.add_argument(
        "--baseline",
        choices=BASELINES,
        nargs="+",
        default=[],
        help="in turns with it: the same networks in PyTorch, eager or under torch.compile, on a GPU in the bundle's "
        "precision; the engine with another backend of the CPU; all runtimes' weights are there at once",
    )
    grid = parser.add_argument_group("what is restored; every combination is measured")
    grid.add_argument("--size", type=_positive, nargs="+", default=[512], metavar="PX", help="sides (default: 512)")
    grid.add_argument("--batch", type=_positive, nargs="+", default=[1], metavar="N", help="photos (default: 1)")
    grid.add_argument("--steps", type=_positive, nargs="+", default=[15], metavar="N", help="default: 15")
    grid.add_argument(
        "--cfg", choices=("on", "off"), nargs="+", default=["on"], help="guidance: the bundle's own, or none"
    )
    parser.add_argument("--repeats", type=_positive, default=7, help="counted restorations (default: %(default)s)")
    parser.add_argument("--warmup", type=_positive, default=1, help="restorations before them (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of all runtimes; default: one per core")
    parser.add_argument(
        "--compute", choices=COMPUTES, default="auto", help="of the engine, as python -m engine.restore"
    )
    parser.add_argument("--vram-budget", type=float, metavar="GIB", help="of the engine, as python -m engine.restore")
    parser.add_argument(
        "--matrix-tflops", type=_rate, metavar="TFLOPS", help="the device's matrix rate; default: it is measured"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the stages as bars (needs matplotlib)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return rate


if __name__ == "__main__":
    sys.exit(run_command(main))
