"""A server among everything that harms it, for half an hour: what is answered, what is wrong, what memory does.

    python benchmarks/soak.py --bundle bundles/ours --minutes 30 --json soak.json --plot soak.png

`triton_repo/serve.py` runs as a user would start it. Clients that stay ask for photos whose results the engine has
computed before, and compare every byte. Beside them clients leave in every way of `benchmarks/leaving.py`, others send
what no server may take, and every --fault-every seconds the next of these happens: a model's process is killed, the
bundle is replaced by another and put back, the server's process is killed, the disk of its log and temporary files is
full for a while. That disk is a tmpfs of its own, which takes root; without it, that fault is left out and told.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as triton
from tqdm import tqdm
from tritonclient.utils import InferenceServerException

from benchmarks.leaving import REFUSED, WAYS, Leavers, Photo, Stayers, leave_all
from benchmarks.machine import describe_machine
from benchmarks.plot import check_matplotlib
from benchmarks.serving import PHOTO, Direct
from engine.bundle.manifest import default_bundle_dir, open_bundle
from engine.cli.console import run_command
from engine.cli.options import command_parser, path_option, whole_number
from engine.errors import RestoreError
from engine.pipeline.restorer import Restorer
from triton_repo.server import Ports, free_ports

_OPTIONS = {"min_size": 64, "upscale": 0.25, "steps": 3}
_STAYING, _PHOTOS = 3, 6
_LOOK_EVERY_S = 5.0
#: How long a bundle is another one, or a disk is full.
_FAULT_S = 20.0
_DISK_MIB = 64
_READY_S = 600.0
_STOP_S = 120.0
_FAULT_COLORS = {
    "model killed": "#b07aa1",
    "server killed": "#d62728",
    "bundle swapped": "#969696",
    "disk full": "#edc948",
}


class ServeCommand:
    """`serve.py` as a process, with its words; a context manager, in which it runs.

    Args:
        bundle: that it serves.
        temporary: folder of its temporary files and its log.
        ports: that it listens on.
    """

    def __init__(self, bundle: Path, temporary: Path, ports: Ports) -> None:
        self._temporary = temporary
        names = [f"--{name}-port={port}" for name, port in zip(("grpc", "http", "metrics"), ports, strict=True)]
        serve = Path(__file__).parent.parent / "triton_repo" / "serve.py"
        self._command = [sys.executable, str(serve), "--bundle", str(bundle), "--no-cache", *names]
        self.lines: list[str] = []
        self._prefixes: set[str] = set()

    def __enter__(self) -> ServeCommand:
        environment = {**os.environ, "TMPDIR": str(self._temporary)}
        self.process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True, env=environment)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()  # Ctrl-C's signal would be ignored where a shell runs this in the background
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()  # which its exit status tells
        self.process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def count(self, words: str) -> int:
        """Return how many of its lines hold some words."""
        return sum(words in line for line in self.lines)

    def wait_until_ready(self) -> None:
        """Wait for its first server.

        Raises:
            RestoreError: it has ended, or takes too long.
        """
        until = time.monotonic() + _READY_S
        while not self.count("ready: "):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RestoreError("the server does not start", found="\n".join(self.lines[-5:]))
            time.sleep(0.2)

    def server(self) -> psutil.Process | None:
        """Return the process of tritonserver; None while there is none."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                if child.name() == "tritonserver" and child.status() != psutil.STATUS_ZOMBIE:
                    return child
        return None

    def models(self) -> list[psutil.Process]:
        """Return the processes of its models."""
        server = self.server()
        with contextlib.suppress(psutil.Error):
            return [] if server is None else server.children()
        return []

    def memory(self) -> tuple[int, int]:
        """Return the bytes that server and models hold, each what it shares, and those of the shared memory."""
        server, held = self.server(), 0
        for process in [] if server is None else [server, *self.models()]:
            with contextlib.suppress(psutil.Error):
                held += process.memory_info().rss
        return held, sum(file.stat().st_blocks * 512 for file in self.regions())

    def regions(self) -> list[Path]:
        """Return the regions of shared memory of every server that has been seen."""
        server = self.server()
        with contextlib.suppress(psutil.Error):
            for part in [] if server is None else server.cmdline():
                if "shm-region-prefix-name=" in part:
                    self._prefixes.add(part.rpartition("=")[2])
        return [file for prefix in self._prefixes for file in Path("/dev/shm").glob(f"{prefix}*")]


class Faults:
    """What happens to the server, in turn.

    Args:
        served: the command.
        bundle: the folder of the bundle that is served.
        other: of another one.
        disk: folder of the server's temporary files, if it can be filled.
    """

    def __init__(self, served: ServeCommand, bundle: Path, other: Path, disk: Path | None, random: Random) -> None:
        self._served, self._bundle, self._other, self._disk, self._random = served, bundle, other, disk, random
        known = [self.kill_model, self.swap_bundle, self.kill_server, *([self.fill_disk] if disk else [])]
        self._turns: Iterator[Callable[[], str]] = cycle(known)

    def next(self) -> str:
        """Have the next one happen, and return what it was."""
        return next(self._turns)()

    def kill_model(self) -> str:
        models = self._served.models()
        if not models:
            return "no model to kill"
        victim = self._random.choice(models)
        name = Path(next(part for part in victim.cmdline() if part.endswith("model.py"))).parts[-3]
        victim.kill()
        return f"model killed: {name}"

    def kill_server(self) -> str:
        server = self._served.server()
        if server is None:
            return "no server to kill"
        server.kill()
        return "server killed"

    def swap_bundle(self) -> str:
        kept = self._bundle.with_name("kept")
        self._bundle.rename(kept)
        self._other.rename(self._bundle)
        time.sleep(_FAULT_S)
        self._bundle.rename(self._other)
        kept.rename(self._bundle)
        return "bundle swapped"

    def fill_disk(self) -> str:
        assert self._disk is not None
        filler = self._disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        time.sleep(_FAULT_S)
        filler.unlink()
        return "disk full"


def bad_requests() -> list[tuple[str, dict[str, Any]]]:
    """Return models and inputs that must be refused, some of them of many bytes."""
    photo = PHOTO.read_bytes()
    noise = np.random.default_rng(0).bytes(20 << 20)

    def restore(image: bytes, options: bytes = b"{}") -> tuple[str, dict[str, Any]]:
        return "restore", {"image": [image], "options": [options]}

    return [
        restore(b"hello"),
        restore(b""),
        restore(photo[: len(photo) // 2]),
        restore(noise),
        restore(photo, b'{"steps": 1000000000}'),
        restore(photo, b'{"upscale": 16}'),
        restore(photo, b"[" * 200_000),
        restore(photo, b'{"prompt": "' + b"x" * 2_000_000 + b'"}'),
        ("text_encoder", {"input_ids": np.zeros((20_000, 77), np.int64)}),
        ("text_encoder", {"input_ids": np.full((1, 77), 10**9, np.int64)}),
        ("vae_encoder", {"pixels": np.zeros((1, 3, 64, 1 << 15), np.float32)}),
        ("vae_encoder", {"pixels": np.zeros((1, 3, 7, 7), np.float32)}),
        ("preprocess", {"image": np.zeros((2, 3), np.float32)}),
        ("no_such_model", {"image": [b""]}),
    ]


def send_bad(ports: Ports, over: threading.Event, found: Counter[str]) -> None:
    """Send bad requests and noise until it is over, and count what becomes of them."""
    requests = cycle(bad_requests())
    with triton.InferenceServerClient(f"127.0.0.1:{ports.grpc}") as client:
        while not over.wait(0.5):
            for port in (ports.grpc, ports.http):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as noisy:
                    noisy.sendall(b"POST /v2/models/restore/infer HTTP/1.1\r\nContent-Length: 99999\r\n\r\n{")
            model, inputs = next(requests)
            tensors = []
            for name, value in inputs.items():
                value = value if isinstance(value, np.ndarray) else np.array(value, dtype=np.object_)
                kind = {"float32": "FP32", "int64": "INT64", "object": "BYTES"}[value.dtype.name]
                tensors.append(triton.InferInput(name, list(value.shape), kind).set_data_from_numpy(value))
            try:
                client.infer(model, tensors, client_timeout=60)
                found["answered as if it were right"] += 1
            except InferenceServerException as error:
                found[str(error.status()).removeprefix("StatusCode.")] += 1


def another_bundle(bundle: Path, folder: Path) -> Path:
    """Return a copy of a bundle with another digest, which opens."""
    shutil.copytree(bundle, folder)
    manifest = folder / "manifest.json"
    found = json.loads(manifest.read_text())
    found["defaults"]["steps"] += 1
    manifest.write_text(json.dumps(found))
    assert open_bundle(folder).digest != open_bundle(bundle).digest
    return folder


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Mount a small disk at a new folder; None where this user may not."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m,mode=700", "restoration-soak", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def soak(options: argparse.Namespace, folder: Path, disk: Path | None) -> dict[str, Any]:
    """Run everything, and return what goes into the report."""
    random, ports, seconds = Random(options.seed), free_ports(), options.minutes * 60
    bundle = folder / "bundle"
    shutil.copytree(open_bundle(options.bundle or default_bundle_dir()).path, bundle)
    other = another_bundle(bundle, folder / "other")
    image = PHOTO.read_bytes()
    with Restorer.open(bundle) as restorer:
        direct = Direct(restorer, image, _OPTIONS)
        photos = [(Photo(image, {**_OPTIONS, "seed": seed}), direct(seed)) for seed in range(_PHOTOS)]
    over, refused, left, leavers_done = threading.Event(), Counter[str](), Counter[tuple[str, str]](), [0]
    memory: list[tuple[float, int, int]] = []
    answers: list[tuple[float, int]] = []
    faults: list[tuple[float, str]] = []

    def leave(leavers: Leavers) -> None:
        while not over.is_set():
            ways = [*WAYS]
            random.shuffle(ways)
            for result in leave_all(leavers, ways, lambda n: photos[n % _PHOTOS][0], 2.0, 2, leavers_done[0]):
                left[result] += 1
                leavers_done[0] += 1
                if result[1] == REFUSED:
                    over.wait(0.5)  # at once, it would be refused again

    temporary = disk or folder / "tmp"
    temporary.mkdir(exist_ok=True)
    with ServeCommand(bundle, temporary, ports) as served:
        served.wait_until_ready()
        happening = Faults(served, bundle, other, disk, random)
        started = time.monotonic()
        with Stayers(ports, _STAYING, photos) as staying, Leavers(ports) as leavers:
            threads = [
                threading.Thread(target=leave, args=(leavers,)),
                threading.Thread(target=send_bad, args=(ports, over, refused)),
            ]
            for thread in threads:
                thread.start()

            def watch() -> None:
                while not over.wait(_LOOK_EVERY_S):
                    now = time.monotonic() - started
                    memory.append((now, *served.memory()))
                    answers.append((now, staying.answers))

            threads.append(threading.Thread(target=watch))
            threads[-1].start()
            with tqdm(total=seconds, unit="s", disable=options.quiet) as bar:
                while (now := time.monotonic() - started) < seconds and served.process.poll() is None:
                    bar.update(int(now) - bar.n)
                    # None in the last minute, so that its end shows how the server is afterwards.
                    if now > options.fault_every * (len(faults) + 1) and now < seconds - 60:
                        faults.append((now, happening.next()))
                    time.sleep(0.2)
            over.set()
            for thread in threads:
                thread.join()
    return {
        "machine": describe_machine(),
        "minutes": options.minutes,
        "disk": "a tmpfs that was filled" if disk else "not filled: this user may not mount one",
        "answers": staying.answers,
        "wrong_answers": staying.wrong,
        "errors": dict(Counter(error.partition("\n")[0] for error in staying.errors)),
        "left": {f"{way}: {what}": count for (way, what), count in sorted(left.items())},
        "clients_that_left": left.total(),
        "bad_requests": dict(refused),
        "faults": faults,
        "restarts": served.count("; starting again in "),
        "said": served.lines,
        "exit_status": served.process.returncode,
        "left_behind": [file.name for file in served.regions()],
        "memory": memory,
        "answers_over_time": answers,
    }


def summary(report: dict[str, Any]) -> str:
    """Return the report in a few lines."""
    held, shared = ([row[place] / 2**20 for row in report["memory"] if row[1]] for place in (1, 2))
    quarter = max(1, len(held) // 4)
    return "\n".join(
        [
            f"{report['minutes']} minutes: {report['answers']} answers, {report['wrong_answers']} wrong",
            f"errors that who stayed was told: {sum(report['errors'].values())}",
            f"clients that left: {report['clients_that_left']}; bad requests: {report['bad_requests']}",
            f"faults: {len(report['faults'])}; restarts: {report['restarts']}; exit status {report['exit_status']}",
            f"memory, MiB: median of the first quarter {np.median(held[:quarter]):.0f}, of the last "
            f"{np.median(held[-quarter:]):.0f}, at most {max(held):.0f}; shared: at most {max(shared):.0f}",
            f"left behind: {report['left_behind'] or 'nothing'}; disk: {report['disk']}",
        ]
    )


def draw(report: dict[str, Any], picture: Path) -> None:
    """Draw memory and answers over time, with the faults."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    minutes = [row[0] / 60 for row in report["memory"]]
    above.plot(minutes, [row[1] / 2**20 for row in report["memory"]], color="#08519c", label="server and models")
    above.plot(minutes, [row[2] / 2**20 for row in report["memory"]], color="#e6550d", label="shared memory")
    above.set_ylabel("MiB")
    above.set_ylim(bottom=0)
    times, counts = zip(*report["answers_over_time"], strict=True)
    below.plot([time / 60 for time in times], counts, color="#59a14f", label="right answers")
    below.set_ylabel("answers, all of them right" if not report["wrong_answers"] else "answers")
    below.set_xlabel("minutes")
    for kind, color in _FAULT_COLORS.items():
        label: str | None = kind
        for when, what in report["faults"]:
            if what.startswith(kind):
                above.axvline(when / 60, color=color, linestyle="--", label=label)
                below.axvline(when / 60, color=color, linestyle="--")
                label = None
    above.legend(ncols=6, loc="upper center", bbox_to_anchor=(0.5, 1.18), fontsize="small", frameon=False)
    figure.savefig(picture, dpi=120, format="png")


def main(arguments: Sequence[str]) -> int:
    """Run the command; it fails where an answer was wrong, or something was left behind."""
    options = _parser().parse_args(arguments)
    if options.plot:
        check_matplotlib()
    with tempfile.TemporaryDirectory(prefix="restoration-soak-") as name:
        folder = Path(name)
        with small_disk(folder / "disk") as disk:
            report = soak(options, folder, disk)
    print(summary(report))
    if options.json:
        options.json.write_text(f"{json.dumps(report, indent=1)}\n")
    if options.plot:
        draw(report, options.plot)
    wrong = report["wrong_answers"] or report["bad_requests"].get("answered as if it were right")
    return int(bool(wrong or report["left_behind"] or report["exit_status"] or not report["answers"]))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python benchmarks/soak.py", __doc__)
    parser.add_argument("--bundle", type=path_option, metavar="DIR", help=f"default: {default_bundle_dir()}")
    parser.add_argument("--minutes", type=whole_number(2, 10_000), default=30, metavar="N", help="default: 30")
    parser.add_argument(
        "--fault-every", type=whole_number(10, 10_000), default=75, metavar="S", help="seconds; default: 75"
    )
    parser.add_argument("--seed", type=whole_number(0, 2**31), default=0, metavar="N", help="default: 0")
    parser.add_argument("--json", type=path_option, metavar="FILE", help="write everything that was counted")
    parser.add_argument("--plot", type=path_option, metavar="PNG", help="draw memory and answers over time")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
