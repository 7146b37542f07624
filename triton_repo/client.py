"""Restore photos through a server: a command, and the classes behind it.

    python triton_repo/client.py photo.jpg -o restored.png
    python triton_repo/client.py photo.jpg -o restored.png --previews previews/ --preview-every 5

In a program:

    from triton_repo.client import Client

    with Client("localhost:8001") as client:
        result = client.restore(Path("photo.jpg").read_bytes(), steps=8, seed=7)
        Path("restored.png").write_bytes(result.image)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.cli.console import run_command
from engine.cli.options import add_settings, command_parser, given_settings, path_option, whole_number
from engine.errors import ImageError, OutputError, UsageError, from_os_error
from engine.image.files import check_output, write_file
from triton_repo.connection import (
    DEFAULT_RETRIES,
    DEFAULT_TIMEOUT_S,
    DEFAULT_URL,
    AsyncClient,
    Client,
    Event,
    Result,
)

__all__ = ["AsyncClient", "Client", "Event", "Result", "main"]

#: Results that are written, by the ending of their names.
_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".tif": "tiff", ".tiff": "tiff"}
_FORMATS[".avif"] = "avif"


def main(arguments: Sequence[str]) -> int:
    """Run the command; raises RestoreError where nothing can be done."""
    options = _parser().parse_args(arguments)
    if options.previews is not None and not options.previews.is_dir():
        raise OutputError("no such folder", where=options.previews, fix="create it first")
    output = options.output or options.image.with_name(f"{options.image.stem}.restored.png")
    check_output(output, overwrite=options.overwrite)
    image = _read(options.image)
    asked = {**given_settings(options), "format": _FORMATS[output.suffix.lower()]}
    with Client(options.url, timeout_s=options.timeout, retries=options.retries) as client:
        if options.wait:
            client.wait(options.wait)
        started = time.monotonic()
        streamed = options.stream or options.previews is not None
        result = _follow(client, image, asked, options) if streamed else client.restore(image, **asked)
        elapsed_s = time.monotonic() - started
    write_file(output, result.image)
    if options.json:
        report = {
            "input": str(options.image),
            "output": str(output),
            **result.provenance,
            "seconds": round(elapsed_s, 3),
        }
        print(json.dumps(report, indent=1))
    elif not options.quiet:
        print(f"{output}  ({elapsed_s:.1f} s, seed {result.provenance['settings']['seed']})")
    return 0


def _follow(client: Client, image: bytes, asked: dict[str, Any], options: argparse.Namespace) -> Result:
    """Restore a photo with a bar over its steps."""
    if options.previews is not None:
        asked["preview_every"] = options.preview_every
    with tqdm(unit="step", disable=options.quiet, file=sys.stderr) as bar:
        for event in client.stream(image, **asked):
            if event.kind == "progress":
                bar.total = event.steps
                bar.update(event.step - bar.n)
            elif event.kind == "preview":
                write_file(options.previews / f"{options.image.stem}.{event.step:04d}.jpg", event.image)
            elif event.kind == "result":
                assert event.provenance is not None
                return Result(event.image, event.provenance)
    raise OutputError("the stream has ended without a result", where=options.url)


def _read(path: Path) -> bytes:
    """Return a file's bytes; whether they are a photo, the server finds out."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError("no such file", where=path, fix="check the path") from None
    except IsADirectoryError:
        raise UsageError("is a folder", where=path, fix="name a photo") from None
    except OSError as error:
        raise from_os_error(error, path, "read the photo", "read") from error


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python triton_repo/client.py", __doc__)
    parser.add_argument("image", type=path_option, metavar="IMG")
    parser.add_argument("-o", "--output", type=path_option, metavar="FILE", help="default: IMG.restored.png beside IMG")
    parser.add_argument("--overwrite", action="store_true", help="replace a result that exists")
    server = parser.add_argument_group("server")
    server.add_argument("--url", default=DEFAULT_URL, metavar="HOST:PORT", help="default: %(default)s")
    server.add_argument("--timeout", type=_seconds, default=DEFAULT_TIMEOUT_S, metavar="S", help="default: %(default)g")
    server.add_argument(
        "--retries",
        type=whole_number(0, 100),
        default=DEFAULT_RETRIES,
        metavar="N",
        help="where the server is not reached or has no room; default: %(default)s",
    )
    server.add_argument("--wait", type=_seconds, metavar="S", help="for the server to be ready")
    told = parser.add_argument_group("what is told")
    told.add_argument("--stream", action="store_true", help="show a bar over the steps")
    told.add_argument("--previews", type=path_option, metavar="DIR", help="write previews there; implies --stream")
    told.add_argument("--preview-every", type=whole_number(1, 1000), default=5, metavar="N", help="steps; default: 5")
    told.add_argument("--json", action="store_true", help="print settings, seed and seconds as JSON")
    told.add_argument("--quiet", action="store_true", help="no bar, no name of the result")
    add_settings(parser)
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"expected seconds such as 60, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(run_command(main))
