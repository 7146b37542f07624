"""Find the layer where two ways of computing a network part, on a real restoration's inputs.

python -m benchmarks.compare photo.jpg --graph unet --ways onnxruntime-fp32 onnxruntime-fp16 --html unet.html

The photo is restored with the bundle up to the step, and what the graph is called with there is given to both ways.
Every layer's result is compared: after all that came before it, and by itself, from the first way's inputs to it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.compare.capture import Captured, capture, check_graphs, check_step
from benchmarks.compare.findings import GraphReport
from benchmarks.compare.graphs import check_precision, check_same_network, load_graph
from benchmarks.compare.layerwise import Limits, Side, compare_layers
from benchmarks.compare.page import write_page
from benchmarks.compare.table import table_lines, verdict_lines
from benchmarks.compare.ways import WAYS, Way, check_pair
from engine.backends import MAX_THREADS
from engine.bundle.manifest import Bundle, default_bundle_dir, open_bundle
from engine.bundle.storage import atomic_write
from engine.cli.options import add_settings, command_parser, given_settings, path_option, whole_number
from engine.cli.report_page import check_page
from engine.errors import OutputError, UsageError, from_os_error, printable

#: Exit status where a layer is beyond a bound.
EXIT_DIFFERS = 1
_ALL = "all"
_DEFAULT_WAYS = ("onnxruntime-fp32", "onnxruntime-fp16")


@dataclass(frozen=True)
class _Pair:
    """The two bundles, which may be one, the two ways, and the CPU threads that each may take."""

    bundles: tuple[Bundle, Bundle]
    ways: tuple[Way, Way]
    threads: int

    def side(self, index: int, graph: str, captured: Captured) -> Side:
        """Return the reference's graph (0) or the examined one (1)."""
        bundle, way = self.bundles[index], self.ways[index]
        shapes = {name: array.shape for name, array in captured.inputs.items()}
        loaded = load_graph(bundle, graph, way.precision_of(bundle.spec(graph).precision), shapes)
        return Side(loaded, way, self.threads)

    @property
    def titles(self) -> tuple[str, str]:
        """What the two are called in reports."""
        names = [way.name for way in self.ways]
        if self.bundles[0] is not self.bundles[1]:
            names = [f"{name} on {bundle.path}" for name, bundle in zip(names, self.bundles, strict=True)]
        return names[0], names[1]


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns 1 where a layer is beyond a bound. Raises RestoreError where nothing can be compared."""
    options = _parser().parse_args(arguments)
    if options.html is not None:
        check_page(options.html, option="--html")
    if options.json is not None:
        _check_json(options.json)
    first = open_bundle(options.bundle)
    second = first if options.other_bundle is None else open_bundle(options.other_bundle)
    pair = _Pair((first, second), (WAYS[options.ways[0]], WAYS[options.ways[1]]), options.threads)
    changes = given_settings(options)
    graphs = list(first.manifest.graphs) if options.graph == _ALL else [options.graph]
    check_graphs(first, graphs)
    check_step(first.manifest.defaults.updated(changes), options.step)
    _check_pair(pair, graphs)
    limits = Limits(options.bound, options.own_bound, options.group_memory << 20)
    must_run = options.graph != _ALL
    found = capture(first, options.photo, graphs, options.step, changes, threads=options.threads, all_must_run=must_run)
    reports = []
    for graph, captured in found.items():
        report = _compare(pair, graph, captured, limits, quiet=options.quiet)
        reports.append(report)
        _print(report, pair.titles, options.rows)
    for graph in graphs:
        if graph not in found:
            print(f"{graph}: this restoration does not run it as a whole")
    facts = {
        "photo": str(options.photo),
        "bundle": str(first.path),
        **({} if second is first else {"other bundle": str(second.path)}),
        "reference": pair.titles[0],
        "examined": pair.titles[1],
        **{name: str(value) for name, value in changes.items()},
    }
    if options.html is not None:
        write_page(options.html, reports, pair.titles, facts)
        print(printable(f"page: {options.html}"))
    if options.json is not None:
        _write_json(options.json, reports, facts)
    return 0 if all(report.agrees for report in reports) else EXIT_DIFFERS


def _check_pair(pair: _Pair, graphs: Sequence[str]) -> None:
    """Find out before the work whether the bundles fit each other and the ways run here."""
    first, second = pair.bundles
    if first is second and pair.ways[0] is pair.ways[1]:
        raise UsageError(
            "the two ways are one", where="--ways", found=pair.ways[0].name, fix="name two, or add --other-bundle"
        )
    check_pair(*pair.ways)
    for graph in graphs:
        check_graphs(second, [graph])
        for bundle, way in zip(pair.bundles, pair.ways, strict=True):
            precision = way.precision_of(bundle.spec(graph).precision)
            way.check_graph(precision)
            check_precision(bundle, graph, precision)
    if first is not second:
        for graph in graphs:
            check_same_network(first, second, graph)


def _compare(pair: _Pair, graph: str, captured: Captured, limits: Limits, *, quiet: bool) -> GraphReport:
    sides = pair.side(0, graph, captured), pair.side(1, graph, captured)
    if pair.bundles[0] is pair.bundles[1] and _precision(pair, graph, 0) == _precision(pair, graph, 1):
        sides = sides[0], replace(sides[0], way=pair.ways[1])
    with tqdm(
        total=len(sides[1].graph.layers), desc=graph, unit="layer", file=sys.stderr, disable=quiet, leave=False
    ) as bar:

        def on_progress(done: int, _: int) -> None:
            bar.update(done - bar.n)

        return compare_layers(sides[0], sides[1], captured.inputs, captured.stage, limits, on_progress)


def _precision(pair: _Pair, graph: str, index: int) -> str:
    return pair.ways[index].precision_of(pair.bundles[index].spec(graph).precision)


def _print(report: GraphReport, titles: tuple[str, str], rows: int) -> None:
    print(printable(f"{report.graph}, {report.stage}: {titles[1]} against {titles[0]}"))
    print(*(f"  {line}" for line in verdict_lines(report)), sep="\n")
    print(*(f"  {line}" for line in table_lines(report, rows)), sep="\n")
    print()


def _check_json(path: Path) -> None:
    """Find out, before the work, whether a file could be written.

    Raises:
        OutputError: its folder is missing or read-only, or it is a folder itself.
    """
    if path.is_dir():
        raise OutputError("it is a folder", where=path, fix="name a file for --json")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise from_os_error(error, path.parent, "write the report") from error


def _write_json(path: Path, reports: Sequence[GraphReport], facts: dict[str, Any]) -> None:
    data = {**facts, "graphs": [report.as_data() for report in reports]}
    with atomic_write(path, "write the report") as file:
        file.write(json.dumps(data, indent=1, allow_nan=False).encode())


def _bound(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a relative error above 0, such as 1e-3, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    ways = "\n".join(f"  {way.name:<17} {way.summary}" for way in WAYS.values())
    parser = command_parser(
        "python -m benchmarks.compare",
        __doc__,
        epilog=f"ways:\n{ways}\n\nExit status: 0 where no layer is beyond a bound, 1 where one is, or for an error.",
    )
    parser.add_argument("photo", type=path_option, metavar="IMG", help="the photo that is restored")
    parser.add_argument(
        "--bundle",
        type=path_option,
        default=default_bundle_dir(),
        metavar="DIR",
        help=f"whose networks restore, and are compared; default: {default_bundle_dir()}",
    )
    parser.add_argument(
        "--other-bundle",
        type=path_option,
        metavar="DIR",
        help="the second way computes this bundle's graph, of the same networks, on the inputs of the first",
    )
    parser.add_argument("--graph", default="unet", metavar="NAME", help="a graph, or all; default: %(default)s")
    parser.add_argument(
        "--step",
        type=whole_number(1, 1000),
        default=1,
        metavar="N",
        help="step of the sampling whose inputs controlnet and unet get; other graphs get those of their first call; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--ways",
        nargs=2,
        choices=WAYS,
        default=_DEFAULT_WAYS,
        metavar=("REFERENCE", "EXAMINED"),
        help="the way that is trusted, and the one that is judged by it; see below; "
        f"default: {' '.join(_DEFAULT_WAYS)}",
    )
    parser.add_argument(
        "--bound",
        type=_bound,
        metavar="E",
        help="relative L2 of a layer's result, after all that came before it; default: 1e-3 in fp32, 3e-2 in fp16, "
        "0.2 in bf16",
    )
    parser.add_argument(
        "--own-bound",
        type=_bound,
        metavar="E",
        help="relative L2 that a layer may add by itself; default: 1e-4 in fp32, 2e-3 in fp16, 8e-3 in bf16",
    )
    parser.add_argument("--html", type=path_option, metavar="FILE.html", help="write a page with every layer")
    parser.add_argument("--json", type=path_option, metavar="FILE", help="write every layer's figures")
    parser.add_argument(
        "--rows", type=whole_number(1, 100_000), default=10, metavar="N", help="of the table; default: %(default)s"
    )
    parser.add_argument(
        "--group-memory",
        type=whole_number(1, 1 << 20),
        default=256,
        metavar="MIB",
        help="results of layers, and weights, that are computed at once; about six times as much memory is used; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--threads",
        type=whole_number(0, MAX_THREADS, " (one per core)"),
        default=0,
        metavar="N",
        help="CPU threads; default: one per core",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_settings(parser)
    return parser
