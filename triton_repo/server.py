"""A running tritonserver: started, waited for, and stopped with all of its processes."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from engine.errors import BackendError, UsageError, from_os_error
from triton_repo.environment import Programs
from triton_repo.repository import serving_of
from triton_repo.runtime_dir import VARIABLE, make_runtime_dir
from triton_repo.shared_memory import SharedMemory, remove_left_behind

#: Interfaces that read this computer's memory, write files, change models, or tell paths: closed to everybody.
RESTRICTED = ("shared-memory", "model-repository", "model-config", "trace", "logging")
#: tritonserver cannot turn an interface off, but asks for a header of any name. Command lines are public
#: (/proc/PID/cmdline), so a secret value would not close anything. A line break within the name does: HTTP ends the
#: header there, and gRPC refuses the request.
_HEADER_THAT_CANNOT_BE_SENT = "closed\nto-everybody"
_STOP_S = 20


@dataclass(frozen=True)
class Ports:
    """Where the server listens."""

    grpc: int = 8001
    http: int = 8000
    metrics: int = 8002

    def __iter__(self) -> Iterator[int]:
        yield from (self.grpc, self.http, self.metrics)


def free_ports() -> Ports:
    """Return ports of the loopback interface that nobody uses at the moment."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(3)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return Ports(*(one.getsockname()[1] for one in sockets))


@dataclass
class Server:
    """A server of one model repository; a context manager.

    Attributes:
        programs: from `find_programs`.
        repository: from `render`.
        log: that the server writes; what is in it from earlier starts stays.
        address: of the interface that it listens on; the default is for this computer alone.
        ports: that it listens on.
        cache_mib: of the response cache; 0 is none.
        start_s: within which it must be ready.
        process, shared_memory, runtime_dir: of the server that runs; None where none does.
    """

    programs: Programs
    repository: Path
    log: Path
    address: str = "127.0.0.1"
    ports: Ports = field(default_factory=Ports)
    cache_mib: int = 64
    start_s: float = 600.0
    process: subprocess.Popen[bytes] | None = None
    shared_memory: SharedMemory | None = None
    runtime_dir: Path | None = None
    _members: frozenset[int] = frozenset()
    _log_start: int = 0

    def command(self) -> list[str]:
        """Return the server's command line."""
        closed = f"{','.join(RESTRICTED)}:{_HEADER_THAT_CANNOT_BE_SENT}={secrets.token_hex(16)}"
        options = {
            "model-repository": self.repository,
            "backend-directory": self.programs.backends,
            "cache-directory": self.programs.caches,
            "grpc-address": self.address,
            "http-address": self.address,
            "grpc-port": self.ports.grpc,
            "http-port": self.ports.http,
            "metrics-port": self.ports.metrics,
            "grpc-infer-allocation-pool-size": 0,  # of requests, which would be kept with all that they held
            "rate-limit": "execution_count",
            # Further ports, which an environment variable of a cloud's would open.
            "allow-sagemaker": "false",
            "allow-vertex-ai": "false",
            "exit-timeout-secs": _STOP_S // 2,
            "grpc-restricted-protocol": closed,
            "http-restricted-api": closed,
        }
        if self.shared_memory is not None:
            options["backend-config"] = f"python,shm-region-prefix-name={self.shared_memory.prefix}"
        if self.cache_mib:
            options["cache-config"] = f"local,size={self.cache_mib << 20}"
        return [str(self.programs.server), *(f"--{name}={value}" for name, value in options.items())]

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until every model is ready.

        Raises:
            UsageError: a port is taken. BackendError: it ends, or takes too long.
            OutputError: log or shared memory cannot be written.
        """
        self._check_ports()
        try:
            self._launch()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def has_lost_a_member(self) -> bool:
        """Tell whether a model's process has died, as where memory ran out.

        Triton 2.51 does not start it again, fails every request that needs it, and says that it is ready.
        """
        return bool(self._members - self._children())

    def is_ready(self) -> bool:
        """Tell whether every model is there and warm."""
        try:
            with urllib.request.urlopen(f"http://{self._host}:{self.ports.http}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def metrics(self) -> str:
        """Return the server's metrics in Prometheus' words."""
        with urllib.request.urlopen(f"http://{self._host}:{self.ports.metrics}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def stop(self) -> None:
        """End the server and its stubs, and remove their shared memory: first they are asked, then they are killed."""
        if self.process is None:
            self._clean_up()
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
        else:
            self._kill_group()
        self.process = None

    def kill(self) -> None:
        """End the server at once, as a computer that runs out of memory would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self._kill_group()

    def why(self) -> str:
        """Return what the log says, since the last start, of a model that could not be loaded, or its last error."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            text = log.read().decode(errors="replace").replace("\\n", "\n")
        found = re.search(r"Failed to initialize Python stub: (?:\w+Error: )?(.*?)\n\nAt:", text, re.DOTALL)
        if found:
            return found[1]
        errors = [line for line in re.findall(r"^E\d{4} .*\] (.*)$", text, re.MULTILINE) if "Cuda" not in line]
        return errors[-1] if errors else text.strip()[-300:]

    def _launch(self) -> None:
        remove_left_behind()
        try:
            self.shared_memory = SharedMemory()
            self.runtime_dir = make_runtime_dir()
            with self.log.open("ab") as log:
                log.write(f"--- started at {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC ---\n".encode())
                log.flush()
                self._log_start = log.tell()
                self.process = subprocess.Popen(
                    self.command(),
                    stdout=log,
                    stderr=log,
                    env={**self.programs.environment, VARIABLE: str(self.runtime_dir)},
                    start_new_session=True,
                    restore_signals=False,  # SIGXFSZ stays ignored: see `_bound_regions`
                    pass_fds=[self.shared_memory.descriptor],
                )
            self._bound_regions(self.process.pid)
        except OSError as error:
            raise from_os_error(error, error.filename or self.log, "start the server") from error

    def _bound_regions(self, process: int) -> None:
        """Bound each model's region of shared memory, which Triton enlarges for a message of any size, and keeps.

        A region is a file. What it cannot hold is refused as long as SIGXFSZ, which Python ignores and the server
        inherits, does not end the server. Models lift the limit for themselves, as they write caches.
        """
        serving = serving_of(self.repository)
        if serving is not None:
            _, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
            wanted = serving.region_bytes
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.prlimit(process, resource.RLIMIT_FSIZE, (soft, hard))

    def _wait_until_ready(self) -> None:
        assert self.process is not None
        started = time.monotonic()
        while not self.is_ready():
            if (status := self.process.poll()) is not None:
                found = self.why() if status >= 0 else f"it died of signal {-status} ({signal.strsignal(-status)})"
                raise BackendError(
                    "the server does not start", where=self.repository, found=found, fix=f"see {self.log}"
                )
            if time.monotonic() - started > self.start_s:
                raise BackendError("the server takes too long", where=self.log, expected=f"{self.start_s:.0f} s")
            time.sleep(0.1)
        self._members = self._children()
        assert self.shared_memory is not None
        self.shared_memory.close_to_others()

    def _children(self) -> frozenset[int]:
        """Return the processes of models that live; a dead one that nobody has waited for does not."""
        assert self.process is not None
        found = set()
        for file in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found |= {int(child) for child in file.read_text().split()}
        return frozenset(child for child in found if _lives(child))

    @property
    def _host(self) -> str:
        return "127.0.0.1" if self.address in ("0.0.0.0", "") else self.address

    def _kill_group(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # stubs that outlive their server
        self._clean_up()

    def _clean_up(self) -> None:
        if self.runtime_dir is not None:
            shutil.rmtree(self.runtime_dir, ignore_errors=True)
            self.runtime_dir = None
        if self.shared_memory is not None:
            self.shared_memory.remove()
            self.shared_memory = None

    def _check_ports(self) -> None:
        if len(set(self.ports)) != 3:
            raise UsageError("three different ports", found=", ".join(map(str, self.ports)))
        for port in self.ports:
            with socket.socket() as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    one.bind((self.address, port))
                except OSError as error:
                    raise UsageError(
                        f"cannot be listened on: {error.strerror}",
                        where=f"{self.address}:{port}",
                        fix="choose another with --grpc-port, --http-port or --metrics-port",
                    ) from error


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
