"""How a server is started, watched and started again, with a small program in tritonserver's place."""

import os
import signal
import stat
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("tritonclient.grpc", reason="needs the triton extra")

from engine.errors import BackendError, OutputError
from triton_repo import serve
from triton_repo.environment import Programs
from triton_repo.serve import Restarts, keep_running
from triton_repo.server import RESTRICTED, Server, free_ports

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="servers run on Linux")

#: Answers as a server does that is ready; or fails, if a file beside the repository says so.
PROGRAM = """#!{python}
import http.server, pathlib, sys
options = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
if pathlib.Path(options["model-repository"], "broken").exists():
    print("E1128 20:00:00.0 1 server.cc:1] the model is broken", flush=True)
    sys.exit(1)
print("I1128 20:00:00.0 1 server.cc:1] a line of this run", flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass

http.server.HTTPServer(("127.0.0.1", int(options["http-port"])), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path):
    program = tmp_path / "tritonserver"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    (tmp_path / "repository").mkdir()
    programs = Programs(program, tmp_path, tmp_path, dict(os.environ))
    made = Server(programs, tmp_path / "repository", tmp_path / "server.log", ports=free_ports(), start_s=30)
    yield made
    made.stop()


def die(server, number=signal.SIGSEGV):
    os.kill(server.process.pid, number)
    server.process.wait()


class EnoughError(Exception):
    """Ends a loop that would go on for ever."""


def test_a_server_that_dies_is_started_again_with_growing_pauses_and_its_log_stays(server, capsys):
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 4:
            raise EnoughError

    def watch_and_kill(watched):
        die(watched)
        return False

    server.has_lost_a_member = lambda: watch_and_kill(server)
    server.start()
    with pytest.raises(EnoughError):
        keep_running(server, Restarts(server.log), sleep)
    assert pauses == [1, 2, 4, 8]
    assert server.log.read_text().count("a line of this run") == 4
    assert capsys.readouterr().err.count(f"signal {int(signal.SIGSEGV)}") == 4


def test_a_server_that_dies_again_and_again_is_an_error_that_names_the_log(server):
    def sleep(seconds):
        (server.repository / "broken").touch()  # from now on no start succeeds

    server.start()
    die(server)
    with pytest.raises(BackendError) as caught:
        keep_running(server, Restarts(server.log), sleep)
    assert str(server.log) in caught.value.fix
    assert "the model is broken" in caught.value.found
    assert server.log.read_text().count("the model is broken") == 5


def test_a_start_that_fails_for_want_of_a_disk_counts_like_any_other(server, monkeypatch):
    """`serve.py` goes on while its limit allows, as somebody may make room."""
    server.start()
    log, pauses = server.log, []

    def sleep(seconds):
        pauses.append(seconds)
        server.log = log if len(pauses) == 3 else Path("/dev/full")
        if len(pauses) == 4:
            raise EnoughError

    server.has_lost_a_member = lambda: die(server)
    with pytest.raises(EnoughError):
        keep_running(server, Restarts(log), sleep)
    assert pauses == [1, 2, 4, 8]
    assert log.read_text().count("a line of this run") == 2


def test_restarts_that_are_long_past_do_not_count(tmp_path):
    now = [0.0]
    restarts = Restarts(tmp_path / "log", clock=lambda: now[0])
    for expected in (1, 2, 4, 8, 16):
        assert restarts.pause_s("it died") == expected
        now[0] += 100
    now[0] = 601  # the first is forgotten
    assert restarts.pause_s("it died") == 16
    with pytest.raises(BackendError, match="dies again and again"):
        restarts.pause_s("it died")
    many = Restarts(tmp_path / "log", limit=9, clock=lambda: 0.0)
    assert [many.pause_s("it died") for _ in range(9)][-3:] == [60, 60, 60]


def test_a_server_that_somebody_stopped_is_not_started_again(server, monkeypatch):
    server.start()
    monkeypatch.setattr(server.process, "wait", lambda timeout=None: 0)
    with pytest.raises(BackendError, match="ended by itself"):
        keep_running(server, Restarts(server.log), lambda seconds: pytest.fail("started again"))
    monkeypatch.undo()


def test_what_a_server_leaves_outside_its_log_goes_with_it(server, monkeypatch):
    server.start()
    runtime, memory = server.runtime_dir, server.shared_memory
    assert str(runtime).encode() in Path(f"/proc/{server.process.pid}/environ").read_bytes()
    region = Path("/dev/shm") / f"{memory.prefix}region"
    region.touch()
    (runtime / "socket").touch()
    server.kill()
    assert not runtime.exists()
    assert not region.exists()
    monkeypatch.setattr(server, "log", Path("/dev/full"))
    with pytest.raises(OutputError, match="the disk is full"):
        server.start()
    assert server.runtime_dir is server.shared_memory is None


def test_a_start_that_fails_is_explained_by_its_own_lines(server):
    (server.repository / "broken").touch()
    with pytest.raises(BackendError, match="does not start") as caught:
        server.start()
    assert caught.value.found == "the model is broken"
    (server.repository / "broken").unlink()
    server.start()
    assert "broken" not in server.why()
    assert "the model is broken" in server.log.read_text()


def test_no_request_can_open_what_is_closed_though_everybody_can_read_the_command(server):
    """A header's name ends at a line break; test_triton_closed.py tries it with a real server."""
    server.start()
    command = Path(f"/proc/{server.process.pid}/cmdline").read_bytes().decode().split("\0")
    closed = [part.partition("=")[2] for part in command if "restricted" in part]
    assert len(closed) == 2
    for setting in closed:
        names, _, header = setting.partition(":")
        assert names == ",".join(RESTRICTED)
        assert "\n" in header.partition("=")[0].strip()


def test_the_log_lies_where_nobody_else_can_put_anything(monkeypatch, tmp_path, capsys):
    """Its folder is private and not foreseeable, and goes where the server was stopped in peace."""
    seen = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(serve, "render", lambda request: [])
    monkeypatch.setattr(serve, "request_of", lambda *rest: None)
    monkeypatch.setattr(serve, "find_programs", lambda say: None)
    monkeypatch.setattr(Server, "start", lambda self: seen.append(self.log))

    def interrupt(server, restarts):
        restarts.log.touch()
        seen.append(stat.S_IMODE(restarts.log.parent.stat().st_mode))
        raise KeyboardInterrupt

    def die_and_interrupt(server, restarts):
        restarts.pause_s("it died")
        interrupt(server, restarts)

    monkeypatch.setattr(serve, "keep_running", interrupt)
    usual = signal.getsignal(signal.SIGTERM)
    try:
        for _ in range(2):
            assert serve.main([]) == 0
        monkeypatch.setattr(serve, "keep_running", die_and_interrupt)
        assert serve.main([]) == 0
    finally:
        signal.signal(signal.SIGTERM, usual)
    first, mode, second, _, died, _ = seen
    assert f"log: {first}\n" in capsys.readouterr().err
    assert mode == 0o700
    assert first.parent != second.parent
    assert not first.parent.exists()
    assert not second.parent.exists()
    assert died.exists()  # it tells why
