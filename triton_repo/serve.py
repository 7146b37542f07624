"""Serve a bundle: render its model repository, start Triton Inference Server, and run until Ctrl-C.

    python triton_repo/serve.py                                  the bundle that build_engines.py built
    python triton_repo/serve.py --bundle bundles/ours --max-batch 8

Where NVIDIA's container does not bring the server, it is installed from a wheel once, into the user's cache folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.bundle.manifest import default_bundle_dir
from engine.cli.console import run_command
from engine.cli.options import path_option, whole_number
from engine.errors import BackendError
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
        log = options.log or Path(tempfile.gettempdir()) / f"restoration-triton-{os.getpid()}.log"
        ports = Ports(options.grpc_port, options.http_port, options.metrics_port)
        _say("starting: every network is opened and run once")
        cache_mib = 0 if options.no_cache else 64
        with Server(programs, repository, log, options.address, ports, cache_mib) as server:
            try:
                _watch(server, log)
            except KeyboardInterrupt:
                _say("stopping")
        if options.log is None:
            log.unlink()  # it went well: nobody will read it
    return 0


def _watch(server: Server, log: Path) -> None:
    """Keep a server as it should be, until the program is interrupted.

    Raises:
        BackendError: the server has ended by itself.
    """
    address, ports = server.address, server.ports
    while True:
        _say(
            f"ready: gRPC {address}:{ports.grpc}, HTTP {address}:{ports.http}, metrics {address}:{ports.metrics}; "
            "Ctrl-C ends it"
        )
        assert server.process is not None
        while not server.has_lost_a_member():
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = server.process.wait(_LOOK_EVERY_S)
                raise BackendError("the server has ended by itself", found=f"status {status}", fix=f"see {log}")
        _say("a member has died; starting again")
        server.stop()
        server.start()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _as_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python triton_repo/serve.py",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
