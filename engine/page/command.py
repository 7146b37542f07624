"""Open a page on which photos are dropped, restored and compared, in any browser on this computer.

python -m engine.web                                     prints the page's address
python -m engine.web --address 0.0.0.0 --auth users.txt  for others in the network, with a password
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.backends.face_detector import INSTALL_DETECTOR, has_detector
from engine.cli.captions import Captioner, add_captions, make_captioner
from engine.cli.engine_options import add_engine, engine_arguments
from engine.cli.faces import add_faces
from engine.cli.options import command_parser, path_option, whole_number
from engine.errors import BackendError, UsageError, from_os_error, printable
from engine.pipeline.faces import FaceRestorer
from engine.pipeline.restorer import Restorer

#: Addresses that only this computer reaches.
_OWN = ("127.0.0.1", "localhost", "::1")
_REAP_S = 60.0
#: Seconds between two looks for work that has come from a browser.
_QUEUE_SLEEP_S = 0.02


def serve(arguments: Sequence[str]) -> int:
    """Run the command; raises RestoreError where nothing can be done."""
    options = _parser().parse_args(arguments)
    captioner = make_captioner(options.caption, options.caption_model)
    if captioner is not None and not captioner.looks:
        raise UsageError("browsers send no text files", where="--caption", expected="none, or a server's address")
    users = None if options.auth is None else read_users(options.auth)
    _check_gradio()
    with contextlib.ExitStack() as opened:
        listening = opened.enter_context(listen(options.address, options.port))
        restorer = opened.enter_context(Restorer.open(**engine_arguments(options)))
        notice = restorer.bundle.manifest.notice
        if notice:
            print(f"note: {printable(notice)}", file=sys.stderr)
        if options.address not in _OWN and users is None:
            print(
                "warning: everybody who reaches this address can use the page; --auth asks for a password",
                file=sys.stderr,
            )
        if captioner is not None:
            print(f"note: where a visitor asks for it, a small picture is sent to {captioner.source}", file=sys.stderr)
        faces = _faces_of(restorer, options)
        if faces is not None:
            opened.enter_context(faces)
        with served(restorer, options, users, captioner, faces) as app:
            _run(app, listening)
    return 0


def _faces_of(restorer: Restorer, options: argparse.Namespace) -> FaceRestorer | None:
    """Return what restores faces; None, which is told, where the extra is not installed.

    Raises:
        BackendError: a bundle for faces was named, and the extra is not installed.
    """
    if options.faces_bundle is None and not has_detector():
        print(f"note: the page has no faces: {INSTALL_DETECTOR}", file=sys.stderr)
        return None
    return FaceRestorer.open(restorer, **{**engine_arguments(options), "bundle": options.faces_bundle})


def read_users(path: Path) -> list[tuple[str, str]]:
    """Return the names and passwords in a file, a line NAME:PASSWORD each; empty lines do not count.

    Raises:
        InputError: it cannot be read.
        UsageError: a line is no such pair, or there are none.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise from_os_error(error, path, "read the passwords", "read") from error
    except UnicodeDecodeError as error:
        raise UsageError("is no text", where=path, expected="lines NAME:PASSWORD in UTF-8") from error
    users = []
    for number, line in enumerate(lines, start=1):
        name, colon, password = line.strip().partition(":")
        if not line.strip():
            continue
        if not colon or not name or not password:
            raise UsageError("no name and password", where=f"{path}, line {number}", expected="NAME:PASSWORD")
        users.append((name, password))
    if not users:
        raise UsageError("names nobody", where=path, expected="a line NAME:PASSWORD for each person")
    return users


@contextlib.contextmanager
def listen(address: str, port: int) -> Iterator[socket.socket]:
    """Open the socket that the page is served on.

    Raises:
        UsageError: the port is taken, or the address is not this computer's.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((address, port))
            opened.listen()
        except OSError as error:
            fix = "choose another with --port, or 0 for any that is free"
            where = f"{address}, port {port}"
            raise UsageError("cannot listen there", where=where, found=error.strerror or error, fix=fix) from error
        yield opened


@contextlib.contextmanager
def served(
    restorer: Restorer,
    options: argparse.Namespace,
    users: list[tuple[str, str]] | None,
    captioner: Captioner | None,
    faces: FaceRestorer | None,
) -> Iterator[Any]:
    """Make the page's application; at the end its work is given up and its files are gone."""
    with tempfile.TemporaryDirectory(prefix="restoration-engine-web-", ignore_cleanup_errors=True) as folder:
        uploads, results = Path(folder) / "uploads", Path(folder) / "results"
        uploads.mkdir()
        results.mkdir()
        # Gradio reads them when its parts are made.
        os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        import gradio as gr
        from fastapi import FastAPI
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from engine.page.desk import Desk
        from engine.page.guard import Guard
        from engine.page.layout import THEME, Page, css
        from engine.page.sessions import Sessions

        gr.set_static_paths([results])  # results are served from where they lie, not from copies
        desk = Desk(restorer, options.queue, faces)
        page = Page(restorer.bundle, desk, Sessions(results, uploads), options.queue, captioner, faces)
        stopped = threading.Event()
        threading.Thread(target=_reap, args=(page, stopped), name="reaper", daemon=True).start()
        blocks = page.build()
        blocks.queue(max_size=None, default_concurrency_limit=None)
        # Gradio looks for work a thousand times a second, which takes a twentieth of a core from the networks.
        blocks._queue.sleep_when_free, blocks._queue.progress_update_sleep_when_free = _QUEUE_SLEEP_S, _QUEUE_SLEEP_S
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_middleware(Guard, folders=(uploads, results))
        if options.address in _OWN:  # else a page from elsewhere could call this one by a name of its own
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
        try:
            yield gr.mount_gradio_app(
                app,
                blocks,
                path="/",
                server_name=options.address,
                server_port=options.port,
                auth=users,
                max_file_size=options.max_file_size * 1_000_000,
                show_error=True,
                ssr_mode=False,
                enable_monitoring=False,
                run_history=False,
                pwa=False,
                footer_links=[],
                theme=THEME,
                css=css(),
            )
        finally:
            stopped.set()
            desk.close()


def _reap(page: Any, stopped: threading.Event) -> None:
    """End visits of programs that do not come back."""
    while not stopped.wait(_REAP_S):
        for name in page.sessions.forgotten():
            page.end(name)


def _run(app: Any, listening: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    import uvicorn

    class Server(uvicorn.Server):  # type: ignore[misc]
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            page = next(route.app for route in app.routes if hasattr(route, "app"))
            page.stop_event.set()  # or the connections of open pages, which never end, would be waited for
            await super().shutdown(sockets)

    address, port = listening.getsockname()[:2]
    host = f"[{address}]" if ":" in address else address
    print(f"page: http://{host}:{port}  (Ctrl-C ends it)", flush=True)
    config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=3, ws="none")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else it ends without removing its files
    with contextlib.suppress(KeyboardInterrupt):  # which is how it ends
        Server(config).run(sockets=[listening])


def _check_gradio() -> None:
    """Find out whether Gradio is installed, without loading it.

    Raises:
        BackendError: it is not.
    """
    missing = next((name for name in ("gradio", "jinja2") if importlib.util.find_spec(name) is None), None)
    if missing is not None:
        fix = "pip install 'restoration-engine[web]'"
        raise BackendError("the page needs Gradio", found=f"no module {missing}", fix=fix)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python -m engine.web", __doc__)
    page = parser.add_argument_group("page")
    page.add_argument(
        "--address",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="that it is served on; 0.0.0.0 for the whole network; default: 127.0.0.1, this computer alone",
    )
    page.add_argument(
        "--port", type=whole_number(0, 65535, " (any free one)"), default=7860, metavar="N", help="default: 7860"
    )
    page.add_argument(
        "--auth",
        type=path_option,
        metavar="FILE",
        help="ask for a password; FILE has a line NAME:PASSWORD for each person",
    )
    page.add_argument(
        "--max-file-size",
        type=whole_number(1, 100_000),
        default=200,
        metavar="MB",
        help="of a photo that is dropped; default: 200",
    )
    page.add_argument(
        "--queue",
        type=whole_number(1, 100_000),
        default=200,
        metavar="N",
        help="photos of all visitors that may wait; default: 200",
    )
    add_captions(parser, "none|URL")
    add_faces(parser, only_bundle=True)
    add_engine(parser)
    return parser
