"""Serve a bundle: render its model repository, start Triton Inference Server, and run until Ctrl-C.

    python triton_repo/serve.py                                  the bundle that build_engines.py built
    python triton_repo/serve.py --bundle bundles/ours --max-batch 8

Where NVIDIA's container does not bring the server, it is installed from a wheel once, into the user's cache folder.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.bundle.manifest import default_bundle_dir
from engine.cli.console import run_command
from engine.cli.options import command_parser, path_option, whole_number
from engine.errors import BackendError, RestoreError
from triton_repo.environment import find_programs
from triton_repo.render import add_layout, render, request_of
from triton_repo.server import Ports, Server

_LOOK_EVERY_S = 1.0


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _as_interrupt)
    with tempfile.TemporaryDirectory(prefix="restoration-triton-") as folder:
        repository = options.repository or Path(folder) / "repository"
        render(request_of(options, options.bundle or default_bundle_dir(), repository))
        programs = find_programs(_say)  # behind what can be wrong: the first time it takes a minute
        # Nobody else can enter this folder, or put a link where the log will be.
        log = options.log or Path(tempfile.mkdtemp(prefix="restoration-triton-log-")) / "server.log"
        ports = Ports(options.grpc_port, options.http_port, options.metrics_port)
        _say(f"starting: every network is opened and run once; log: {log}")
        restarts = Restarts(log)
        cache_mib = 0 if options.no_cache else 64
        with Server(programs, repository, log, options.address, ports, cache_mib) as server:
            try:
                keep_running(server, restarts)
            except KeyboardInterrupt:
                _say("stopping")
        if options.log is None and not restarts.deaths:
            shutil.rmtree(log.parent)  # it went well: nobody will read it
    return 0


@dataclass
class Restarts:
    """How soon, and how often, a server that has died is started again.

    Attributes:
        log: of the server, for the error.
        limit: of restarts within `within_s`.
        longest_s: of the pauses, each of which is twice the last.
        clock: tells the time in seconds.
        deaths: so far.
    """

    log: Path
    limit: int = 5
    within_s: float = 600.0
    longest_s: float = 60.0
    clock: Callable[[], float] = time.monotonic
    deaths: int = 0
    _times: list[float] = field(default_factory=list)

    def pause_s(self, reason: str) -> float:
        """Note that the server has died, and return how long to wait before it is started again.

        Args:
            reason: why it has died.
        Raises:
            BackendError: it has died too often.
        """
        now = self.clock()
        self.deaths += 1
        self._times = [before for before in self._times if now - before < self.within_s]
        if len(self._times) >= self.limit:
            raise BackendError(
                "the server dies again and again",
                expected=f"at most {self.limit} restarts within {self.within_s / 60:.0f} minutes",
                found=reason,
                fix=f"see {self.log}, which holds what every start wrote",
            )
        self._times.append(now)
        return min(self.longest_s, 2.0 ** (len(self._times) - 1))


def keep_running(server: Server, restarts: Restarts, sleep: Callable[[float], None] = time.sleep) -> None:
    """Start a server again whenever it or a model dies, until the program is interrupted.

    Args:
        server: that has been started.
        restarts: how soon and how often.
        sleep: waits for some seconds.
    Raises:
        BackendError: the server has ended without a fault, or dies too often.
    """
    while True:
        address, ports = server.address, server.ports
        _say(
            f"ready: gRPC {address}:{ports.grpc}, HTTP {address}:{ports.http}, metrics {address}:{ports.metrics}; "
            "Ctrl-C ends it"
        )
        reason = _wait_for_death(server, restarts.log)
        while True:
            pause_s = restarts.pause_s(reason)
            _say(f"{reason}; starting again in {pause_s:.0f} s")
            server.stop()
            sleep(pause_s)
            try:
                server.start()
                break
            except RestoreError as error:  # a full disk, too; it counts as another death
                reason = error.problem + (f" ({error.found})" if error.found else "")


def _wait_for_death(server: Server, log: Path) -> str:
    """Wait until a server or one of its models dies, and return what happened.

    Raises:
        BackendError: the server has ended without a signal: somebody stopped it, or it gave up.
    """
    assert server.process is not None
    while True:
        has_lost_a_member = server.has_lost_a_member()
        try:
            status = server.process.wait(_LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            if has_lost_a_member:  # and not because the server itself has ended
                return "a model has died"
            continue
        if status < 0:
            return f"the server has died of signal {-status} ({signal.strsignal(-status)})"
        raise BackendError("the server has ended by itself", found=f"status {status}", fix=f"see {log}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _as_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python triton_repo/serve.py", __doc__)
    parser.add_argument("--bundle", type=path_option, metavar="DIR", help=f"default: {default_bundle_dir()}")
    parser.add_argument("--repository", type=path_option, metavar="REPO", help="keep the model repository there")
    parser.add_argument("--log", type=path_option, metavar="FILE", help="keep the server's log there")
    place = parser.add_argument_group("where it listens")
    default = Ports()
    place.add_argument(
        "--address",
        default="127.0.0.1",
        metavar="IP",
        help="default: 127.0.0.1, this computer alone; anybody who reaches it may use it",
    )
    for name, port in (("grpc", default.grpc), ("http", default.http), ("metrics", default.metrics)):
        place.add_argument(
            f"--{name}-port", type=whole_number(1, 65535), default=port, metavar="N", help=f"default: {port}"
        )
    add_layout(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
