"""What the page adds to a photo over the command line's code, and whether its memory stays.

    python benchmarks/page.py --image tests/data/coffee-damaged.jpg --turns 7 --json page.json

Two processes take turns, each with its networks open: one restores files as `python -m engine.restore` does, the other
is the page's server, asked by Gradio's client as a browser asks it: the photo is uploaded, restored, written and
downloaded, with an estimate after every step. Processor time is that of the process and of those it starts; on a
machine that does other work too, it says more than seconds do. The first turn warms up and is not counted.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from gradio_client import Client, handle_file
from tqdm import tqdm

from benchmarks.machine import describe_machine
from benchmarks.serving import PHOTO
from benchmarks.summary import aim_text
from engine.cli.console import run_command
from engine.cli.options import command_parser, path_option, whole_number
from engine.errors import RestoreError
from engine.units import format_memory

#: The most that the page may add; see the issue on the page.
AIM_ADDED = 0.03
#: Restores the file of each line that it reads into the next line's, and answers with a line.
_COMMAND = """
import sys
from pathlib import Path
from engine.cli.batch import BatchRunner, restore_all
from engine.cli.jobs import PhotoJob
from engine.pipeline.restorer import Restorer

class Quiet:
    def begin(self, job): pass
    def step(self): pass
    def part(self, stage, done, total): pass
    def note(self, text, *, detail=False): pass

with Restorer.open(sys.argv[1] or None, threads=int(sys.argv[2])) as restorer:
    work = BatchRunner(restorer, restorer.defaults.updated({"seed": 0}), overwrite=True)
    for line in sys.stdin:
        job = PhotoJob(Path(line.strip()), ((0, Path(sys.stdin.readline().strip())),))
        outcome, = restore_all([job], work, Quiet())
        print(outcome.error or "done", flush=True)
"""


@dataclass
class Side:
    """One of the two that take turns.

    Attributes:
        name: as the table calls it.
        process: whose time and memory count.
        restore: restores the photo once.
        seconds, processor_seconds: of each counted turn.
        memory_bytes: resident after each turn.
    """

    name: str
    process: psutil.Process
    restore: Callable[[], None]
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)

    def turn(self, *, counted: bool) -> None:
        """Restore the photo once, and keep what it took."""
        started, processor_started = time.perf_counter(), self._processor_seconds()
        self.restore()
        if counted:
            self.seconds.append(time.perf_counter() - started)
            self.processor_seconds.append(self._processor_seconds() - processor_started)
            self.memory_bytes.append(self.process.memory_info().rss)

    def _processor_seconds(self) -> float:
        times = [each.cpu_times() for each in (self.process, *self.process.children(recursive=True))]
        return sum(each.user + each.system for each in times)


@contextmanager
def command_side(bundle: Path | None, threads: int, photo: Path, folder: Path) -> Iterator[Side]:
    """Start the command line's side, with its networks open, and end it."""
    command = [sys.executable, "-c", _COMMAND, str(bundle or ""), str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        order, answers = process.stdin, process.stdout

        def restore() -> None:
            order.write(f"{photo}\n{folder / 'command.png'}\n")
            order.flush()
            if (answer := answers.readline().strip()) != "done":
                raise RestoreError("the command line's side failed", where=photo, found=answer)

        yield Side("command line", psutil.Process(process.pid), restore)
        order.close()


@contextmanager
def page_side(bundle: Path | None, threads: int, photo: Path, folder: Path) -> Iterator[Side]:
    """Start the page's server, and end it."""
    command = [sys.executable, "-m", "engine.web", "--port", "0", "--threads", str(threads)]
    command += [] if bundle is None else ["--bundle", str(bundle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise RestoreError("the page's server did not start")
        client = Client(found.group(), verbose=False, download_files=str(folder))

        def restore() -> None:
            client.predict(handle_file(photo), {"seed": 0}, api_name="/restore")

        try:
            yield Side("page", psutil.Process(process.pid), restore)
        finally:
            client.close()
            process.terminate()


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    parser = command_parser("python benchmarks/page.py", __doc__)
    parser.add_argument("--bundle", type=path_option, metavar="DIR")
    parser.add_argument("--image", type=path_option, default=PHOTO, metavar="FILE")
    parser.add_argument("--turns", type=whole_number(1, 10_000), default=7, metavar="N")
    parser.add_argument("--threads", type=whole_number(0, 1024), default=0, metavar="N", help="0 is one per core")
    parser.add_argument("--json", type=path_option, metavar="FILE")
    options = parser.parse_args(arguments)
    given = options.bundle, options.threads, options.image.resolve()
    with (
        tempfile.TemporaryDirectory() as folder,
        command_side(*given, Path(folder)) as command,
        page_side(*given, Path(folder)) as page,
    ):
        for turn in tqdm(range(options.turns + 1), unit="turn", file=sys.stderr):
            for side in (command, page):
                side.turn(counted=turn > 0)
    found = report(command, page)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": describe_machine(), **found}, indent=1) + "\n")
    return 0


def report(command: Side, page: Side) -> dict[str, Any]:
    """Print the two sides as a table; returns all figures as plain data."""
    print("| | seconds | processor seconds | memory, first and last turn |\n|---|---:|---:|---:|")
    for side in (command, page):
        memory = " and ".join(format_memory(each) for each in (side.memory_bytes[0], side.memory_bytes[-1]))
        seconds, processor = statistics.median(side.seconds), statistics.median(side.processor_seconds)
        print(f"| {side.name} | {seconds:.2f} | {processor:.2f} | {memory} |")
    # Turn by turn, since a shared machine has slow minutes.
    added = {
        name: statistics.median(
            mine / its - 1 for mine, its in zip(getattr(page, name), getattr(command, name), strict=True)
        )
        for name in ("seconds", "processor_seconds")
    }
    told = aim_text(added["seconds"], AIM_ADDED, "{:.1%}", less=True)
    print(f"\nadded by the page: of the seconds {told}, of the processor's {added['processor_seconds']:.1%}")
    figures = ("seconds", "processor_seconds", "memory_bytes")
    sides = {side.name: {name: getattr(side, name) for name in figures} for side in (command, page)}
    return {"sides": sides, "added": added}


if __name__ == "__main__":
    sys.exit(run_command(main))
