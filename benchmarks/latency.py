"""How long a restoration takes, per stage: the engine, and the same networks in eager PyTorch.

    python benchmarks/latency.py --baseline torch --size 256 512 --json latency.json

Each contender is a process of its own, so its peak memory is its own. They take turns, restoration
by restoration, so that what else the machine does falls on both. The first one of each size is
warm-up: it opens the graphs, and is not counted. Figures are medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import describe_machine
from engine.bundle import default_bundle_dir, open_bundle
from engine.console import run_command
from engine.errors import BackendError

#: What issue 1 asks for; printed with what was found.
AIM_FASTER, AIM_MEMORY, AIM_OUTSIDE = 1.3, 0.6, 0.02
_STAGES = ("text", "denoise encoder", "stage 1", "controlnet", "unet", "vae decoder")


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = _parser().parse_args(arguments)
    bundle = open_bundle(options.bundle or default_bundle_dir())  # said before two processes say it
    contenders = ["engine"] + ([options.baseline] if options.baseline else [])
    results = [
        {"size_px": size, "steps": options.steps, **_measure(contenders, size, options)} for size in options.size
    ]
    report = {
        "machine": describe_machine(),
        "bundle": {
            "name": bundle.manifest.name,
            "digest": bundle.digest,
            "precision": bundle.manifest.precision,
            "parameters_bytes": bundle.manifest.weights.bytes,
        },
        "threads": options.threads,
        "repeats": options.repeats,
        "results": results,
    }
    print(to_markdown(report))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _measure(contenders: Sequence[str], size: int, options: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")  # no library of one contender in the other
    bundle = options.bundle or default_bundle_dir()
    workers: dict[str, tuple[Any, Connection]] = {}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    try:
        for name in contenders:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, name, bundle, options.threads), daemon=True)
            process.start()
            there.close()  # so that the end of the process is the end of the pipe
            workers[name] = process, here
            _answer(name, process, here)  # ready: one imports its libraries while the other waits
        rounds = options.repeats + 1
        for _ in tqdm(range(rounds), desc=f"{size} px", unit="round", file=sys.stderr, disable=options.quiet):
            for name, (process, connection) in workers.items():
                connection.send({"size": size, "steps": options.steps})
                runs[name].append(_answer(name, process, connection))
    finally:
        for process, connection in workers.values():
            connection.close()
            process.join(timeout=5)
            process.kill()
    return {"contenders": {name: _summary(found) for name, found in runs.items()}}


def _answer(name: str, process: Any, connection: Connection) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = connection.recv()
    except EOFError:
        process.join(timeout=5)
        raise BackendError(
            "the process ended",
            where=name,
            found=f"exit status {process.exitcode}",
            fix="if that is -9, memory ran out: measure a smaller --size",
        ) from None
    if "error" in answer:
        raise BackendError("the process failed", where=name, found=answer["error"])
    return answer


def _work(connection: Connection, name: str, bundle_path: Path, threads: int) -> None:
    """Be the other process: one restoration per message."""
    try:
        import numpy as np

        from engine import Restorer
        from engine.backends import make_backend
        from engine.console import peak_memory_bytes

        bundle = open_bundle(bundle_path)
        if name == "torch":
            from benchmarks.torch_backend import TorchBackend

            restorer = Restorer(bundle, TorchBackend(bundle, threads))
        else:
            restorer = Restorer(bundle, make_backend("onnxruntime", threads=threads))
        connection.send({})
        while True:
            task = connection.recv()
            size = task["size"]
            photo = np.random.default_rng(0).random((size, size, 3), dtype=np.float32)
            restorer.forget_texts()
            result = restorer.restore(photo, min_size=size, steps=task["steps"])
            connection.send(
                {
                    "graphs_ms": result.timings.graphs_ms,
                    "outside_ms": result.timings.outside_ms,
                    "total_ms": result.timings.total_ms,
                    "peak_memory_bytes": peak_memory_bytes(),
                }
            )
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as error:
        connection.send({"error": f"{type(error).__name__}: {error}"})


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    counted = runs[1:]

    def medians(group: str) -> dict[str, float]:
        return {
            stage: round(statistics.median(run[group].get(stage, 0.0) for run in counted), 2)
            for stage in counted[-1][group]
        }

    outside = statistics.median(sum(run["outside_ms"].values()) / run["total_ms"] for run in counted)
    totals = [run["total_ms"] for run in counted]
    return {
        "graphs_ms": medians("graphs_ms"),
        "outside_ms": medians("outside_ms"),
        "total_ms": round(statistics.median(totals), 1),
        "totals_ms": [round(total, 1) for total in totals],
        "first_ms": round(runs[0]["total_ms"], 1),
        "outside_share": round(outside, 4),
        "peak_memory_bytes": max(run["peak_memory_bytes"] or 0 for run in runs),
    }


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as tables for a person."""
    machine = report["machine"]
    lines = [
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"Python {machine['python']}, onnxruntime {machine['versions']['onnxruntime']}, "
        f"torch {machine['versions']['torch']}",
        f"bundle {report['bundle']['name']} ({report['bundle']['precision']}), medians of {report['repeats']} "
        f"restorations in turns; `{machine['command']}`",
    ]
    for result in report["results"]:
        lines += ["", f"### {result['size_px']} × {result['size_px']} px, {result['steps']} steps", ""]
        lines += _table(result["contenders"])
    return "\n".join(lines)


def _table(contenders: dict[str, dict[str, Any]]) -> list[str]:
    engine, *others = contenders
    base = contenders[others[0]] if others else None
    rows = [
        [stage, *(contender["graphs_ms"].get(stage, 0.0) for contender in contenders.values())] for stage in _STAGES
    ]
    rows.append(["outside graphs", *(sum(contender["outside_ms"].values()) for contender in contenders.values())])
    rows.append(["**total**", *(contender["total_ms"] for contender in contenders.values())])
    rows.append(["first, graphs opened in it", *(contender["first_ms"] for contender in contenders.values())])
    head = ["ms", *contenders] + (["ratio"] if base else [])
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for label, *values in rows:
        ratio = [f"{values[1] / values[0]:.2f}"] if base and values[0] else [""] * bool(base)
        lines.append(f"| {' | '.join([str(label), *(f'{value:.0f}' for value in values), *ratio])} |")
    peaks = [contender["peak_memory_bytes"] / 2**20 for contender in contenders.values()]
    ratio = [f"{peaks[1] / peaks[0]:.2f}"] if base else []
    lines.append(f"| {' | '.join(['peak memory, MiB', *(f'{peak:.0f}' for peak in peaks), *ratio])} |")
    lines += ["", f"Outside the graphs: {_aim(contenders[engine]['outside_share'], AIM_OUTSIDE, '{:.1%}', less=True)}."]
    if base:
        faster = base["total_ms"] / contenders[engine]["total_ms"]
        memory = contenders[engine]["peak_memory_bytes"] / base["peak_memory_bytes"]
        lines.append(f"Faster than {others[0]}: {_aim(faster, AIM_FASTER, '{:.2f} ×', less=False)}.")
        lines.append(f"Of its memory: {_aim(memory, AIM_MEMORY, '{:.0%}', less=True)}.")
    return lines


def _aim(found: float, aim: float, form: str, *, less: bool) -> str:
    reached = found <= aim if less else found >= aim
    bound = "at most" if less else "at least"
    return f"{form.format(found)} (aim: {bound} {form.format(aim)}, {'reached' if reached else 'missed'})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/latency.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, metavar="DIR", help=f"default: {default_bundle_dir()}")
    parser.add_argument("--baseline", choices=("torch",), help="the same networks in eager PyTorch, in turns")
    parser.add_argument(
        "--size", type=_positive, nargs="+", default=[512], metavar="PX", help="sides (default: %(default)s)"
    )
    parser.add_argument("--steps", type=_positive, default=15, help="default: %(default)s")
    parser.add_argument("--repeats", type=_positive, default=7, help="counted restorations (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of both; default: one per core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(run_command(main))
