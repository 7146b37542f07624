"""What serving costs, and what it gives: a closed loop of clients against a server on this computer.

    python benchmarks/serving.py --bundle bundles/ours --clients 1 2 4 8 16 --json serving.json

Each client sends its next request when it has the answer to its last. Every request has a seed of its own, and the
server's response cache is off, so nothing is answered twice. A first round of each number of clients is not counted,
for batches of new sizes take memory, once. The direct call does the same work in this process: encoded photo in,
encoded photo out. Direct and served runs take turns, for a shared machine has slow minutes; the ratio of a turn's two
is what counts, and its median is told. Batching is measured on and off, on two servers, one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import describe_machine
from benchmarks.summary import aim_text, percentile
from engine.bundle.manifest import default_bundle_dir
from engine.cli.console import run_command
from engine.cli.options import command_parser, path_option, whole_number
from engine.image.decoding import decode_photo
from engine.image.encoding import encode_photo
from engine.pipeline.restorer import Restorer
from triton_repo.client import Client
from triton_repo.environment import find_programs
from triton_repo.render import Request, render
from triton_repo.repository import DeploymentConfig
from triton_repo.server import Server, free_ports

#: What the project aims at; see the issue on serving.
AIM_OVERHEAD = 0.05
AIM_CLIENTS = 8
#: The sample of the README.
PHOTO = Path(__file__).parent.parent / "tests" / "data" / "coffee-damaged.jpg"
BATCHING = {"on": 8, "off": 1}


@dataclass
class Load:
    """A closed loop's results, over all turns.

    Attributes:
        clients: that asked at once.
        latencies_s: of each request.
        served_per_s, direct_per_s: photos a second, by turn.
        queue_share, compute_share: of the requests' time, by the server's own statistics.
        batch: requests that sampled together, mean.
    """

    clients: int
    latencies_s: list[float] = field(default_factory=list)
    served_per_s: list[float] = field(default_factory=list)
    direct_per_s: list[float] = field(default_factory=list)
    queue_share: float = 0.0
    compute_share: float = 0.0
    batch: float = 0.0

    def report(self) -> dict[str, Any]:
        """Return what goes into table and JSON."""
        ratios = [served / direct for served, direct in zip(self.served_per_s, self.direct_per_s, strict=True)]
        return {
            "clients": self.clients,
            "requests": len(self.latencies_s),
            "photos_per_s": statistics.median(self.served_per_s),
            "direct_photos_per_s": statistics.median(self.direct_per_s),
            "throughput_over_direct": statistics.median(ratios),
            "throughput_over_direct_by_turn": ratios,
            **{f"p{share}_s": percentile(self.latencies_s, share) for share in (50, 95, 99)},
            "queue_share": self.queue_share,
            "compute_share": self.compute_share,
            "batch": self.batch,
            "latencies_s": self.latencies_s,
        }


class Direct:
    """The engine in this process, at a server's whole work: from an encoded photo to one."""

    def __init__(self, restorer: Restorer, photo: bytes, changes: dict[str, Any]) -> None:
        self._restorer, self._photo, self._changes = restorer, photo, changes

    def __call__(self, seed: int) -> bytes:
        result = self._restorer.restore(decode_photo(self._photo), seed=seed, **self._changes)
        return encode_photo(result.photo, ".png", result.provenance)


def closed_loop(
    url: str, photo: bytes, load: Load, requests: int, seeds: Iterator[int], changes: dict[str, Any]
) -> None:
    """Have `load.clients` clients ask for `requests` photos between them, and note how long each took."""
    share, more = divmod(requests, load.clients)

    def ask(number: int) -> list[float]:
        found = []
        with Client(url, timeout_s=3600, retries=0) as client:
            for _ in range(share + (number < more)):
                started = time.perf_counter()
                client.restore(photo, seed=next(seeds), **changes)
                found.append(time.perf_counter() - started)
        return found

    started = time.perf_counter()
    with ThreadPoolExecutor(load.clients) as pool:
        for latencies in pool.map(ask, range(load.clients)):
            load.latencies_s += latencies
    load.served_per_s.append(requests / (time.perf_counter() - started))


def statistics_of(url: str) -> dict[str, dict[str, int]]:
    """Return the server's own counters of every member: nanoseconds, requests and executions."""
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(url) as client:
        found = client.get_inference_statistics(as_json=True)["model_stats"]
    return {
        entry["name"]: {
            "executions": int(entry.get("execution_count", 0)),
            "requests": int(entry.get("inference_count", 0)),
            **{
                name: int(entry["inference_stats"].get(name, {}).get("ns", 0))
                for name in ("success", "queue", "compute_infer")
            },
        }
        for entry in found
    }


def note_shares(load: Load, before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> None:
    """Note which share of the requests' time was waiting and which was work, by the server's own clocks."""

    def grown(model: str, counter: str) -> int:
        return after[model][counter] - before[model][counter]

    whole = grown("restore", "success")
    members = [name for name in after if name not in ("restore", "restore_stream", "text_encoder", "text_encoder_2")]
    load.queue_share = sum(grown(name, "queue") for name in members) / whole
    load.compute_share = sum(grown(name, "compute_infer") for name in members) / whole
    load.batch = grown("sample", "requests") / max(1, grown("sample", "executions"))


def overhead(
    url: str, photo: bytes, direct: Direct, pairs: int, seeds: Iterator[int], changes: dict[str, Any]
) -> dict[str, Any]:
    """Return how much longer one client waits than a direct call takes, call by call in turns."""
    served_s, direct_s = [], []
    with Client(url, timeout_s=3600, retries=0) as client:
        for number in range(pairs):
            for which in ("served", "direct") if number % 2 else ("direct", "served"):
                seed = next(seeds)
                started = time.perf_counter()
                if which == "served":
                    client.restore(photo, seed=seed, **changes)
                    served_s.append(time.perf_counter() - started)
                else:
                    direct(seed)
                    direct_s.append(time.perf_counter() - started)
    ratios = [served / alone for served, alone in zip(served_s, direct_s, strict=True)]
    return {
        "served_s": served_s,
        "direct_s": direct_s,
        "served_median_s": statistics.median(served_s),
        "direct_median_s": statistics.median(direct_s),
        "overhead": statistics.median(ratios) - 1.0,
        "overhead_of_medians": statistics.median(served_s) / statistics.median(direct_s) - 1.0,
    }


@contextlib.contextmanager
def served(bundle: Path, max_batch: int, delay_ms: int) -> Iterator[Server]:
    """Run a server of a bundle, without a cache."""
    with tempfile.TemporaryDirectory(prefix="serving-benchmark-") as folder:
        layout = DeploymentConfig(cache=False, queue_delay_us=delay_ms * 1000, max_queue=1000)
        repository = Path(folder) / "repository"
        render(Request(bundle, repository, layout=layout, limits={"max_batch": max_batch}))
        log = Path(folder) / "server.log"
        with Server(find_programs(_say), repository, log, ports=free_ports(), cache_mib=0) as server:
            yield server


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = _parser().parse_args(arguments)
    bundle = options.bundle or default_bundle_dir()
    photo = options.photo.read_bytes()
    seeds = count(1)
    report: dict[str, Any] = {"machine": describe_machine(), "photo": options.photo.name}
    work = sum(2 * max(clients, options.requests) for clients in options.clients) * options.turns + 2 * options.pairs
    with Restorer.open(bundle) as restorer, tqdm(total=len(BATCHING) * work, disable=options.quiet) as bar:
        report["bundle"] = {"name": restorer.bundle.manifest.name, "digest": restorer.bundle.digest}
        changes = {name: value for name in ("steps", "min_size") if (value := getattr(options, name)) is not None}
        settings = restorer.defaults.updated(changes)
        report["steps"] = settings.steps
        report["size"] = restorer.working_size(decode_photo(photo).size, settings)
        direct = Direct(restorer, photo, changes)
        direct(0)
        for name, max_batch in BATCHING.items():
            with served(bundle, max_batch, options.queue_delay_ms) as server:
                url = f"127.0.0.1:{server.ports.grpc}"
                with Client(url) as client:
                    client.restore(photo, seed=0, **changes)
                found: dict[str, Any] = {"max_batch": max_batch}
                found["one_client"] = overhead(url, photo, direct, options.pairs, seeds, changes)
                bar.update(2 * options.pairs)
                found["loads"] = []
                report[f"batching_{name}"] = found
                for clients in options.clients:
                    load = Load(clients)
                    requests = max(clients, options.requests)
                    closed_loop(url, photo, Load(clients), clients, seeds, changes)  # not counted
                    before = statistics_of(url)
                    for _ in range(options.turns):
                        started = time.perf_counter()
                        for seed in range(requests):
                            direct(seed)
                            bar.update()
                        load.direct_per_s.append(requests / (time.perf_counter() - started))
                        closed_loop(url, photo, load, requests, seeds, changes)
                        bar.update(requests)
                    note_shares(load, before, statistics_of(url))
                    found["loads"].append(load.report())
                    _keep(report, options.json)
    print(to_markdown(report))
    return 0


def _keep(report: dict[str, Any], file: Path | None) -> None:
    """Write what has been measured so far: a run that is ended early has not been for nothing."""
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n")


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a table for a person."""
    machine = report["machine"]
    lines = [
        f"# Serving, {machine['date']}",
        "",
        f"- `{machine['command']}`",
        f"- {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"- bundle {report['bundle']['name']}, {report['photo']} at {report['size'][0]} × {report['size'][1]}, "
        f"{report['steps']} steps",
        "",
        "| batching | clients | photos / s | over direct | p50, s | p95, s | p99, s | queue | compute | batch |",
        "|---|" + "---:|" * 9,
    ]
    for name in BATCHING:
        for load in report[f"batching_{name}"]["loads"]:
            lines.append(
                f"| {name} | {load['clients']} | {load['photos_per_s']:.3f} | {load['throughput_over_direct']:.2f} × | "
                f"{load['p50_s']:.2f} | {load['p95_s']:.2f} | {load['p99_s']:.2f} | {load['queue_share']:.0%} | "
                f"{load['compute_share']:.0%} | {load['batch']:.1f} |"
            )
    lines.append("")
    for name in BATCHING:
        found = report[f"batching_{name}"]
        one = found["one_client"]
        longer = aim_text(one["overhead"], AIM_OVERHEAD, "{:+.1%}", less=True)
        lines.append(
            f"Batching {name}: one client waits {longer} longer than a direct "
            f"call takes ({one['served_median_s']:.2f} s and {one['direct_median_s']:.2f} s, medians of "
            f"{len(one['served_s'])})."
        )
        for load in found["loads"]:
            if load["clients"] == AIM_CLIENTS:
                ratio = aim_text(load["throughput_over_direct"], 1.0, "{:.2f}", less=False)
                lines.append(f"Batching {name}: at {AIM_CLIENTS} clients, {ratio} times the direct loop's throughput.")
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python benchmarks/serving.py", __doc__)
    parser.add_argument("--bundle", type=path_option, metavar="DIR", help=f"default: {default_bundle_dir()}")
    parser.add_argument("--photo", type=path_option, metavar="IMG", default=PHOTO, help="default: the damaged sample")
    parser.add_argument("--clients", type=whole_number(1, 16), nargs="+", default=[1, 2, 4, 8, 16], metavar="N")
    parser.add_argument(
        "--requests", type=whole_number(1, 1000), default=8, metavar="N", help="of a turn, at least (default: 8)"
    )
    parser.add_argument("--turns", type=whole_number(1, 100), default=3, metavar="N", help="default: 3")
    parser.add_argument("--pairs", type=whole_number(1, 1000), default=11, metavar="N", help="default: 11")
    parser.add_argument("--steps", type=whole_number(1, 200), metavar="N", help="default: the bundle's")
    parser.add_argument("--min-size", type=whole_number(64, 8192), metavar="PX", help="default: the bundle's")
    parser.add_argument("--queue-delay-ms", type=whole_number(0, 10_000), default=20, metavar="MS", help="default: 20")
    parser.add_argument("--json", type=path_option, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
