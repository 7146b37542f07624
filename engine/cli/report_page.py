"""A page about a run, for any browser: before and after of every photo, and what failed.

One file without anything from elsewhere. Names and texts are strangers', so all of them are escaped, and the
page's own policy lets no script but its own run. Cards wait on disk: memory holds one photo's pictures.
"""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import tempfile
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from engine.bundle.storage import APP_NAME, atomic_write
from engine.cli.batch import Outcome
from engine.cli.faces import boxes_html, face_style
from engine.cli.summary import RunSummary, reason
from engine.errors import OutputError, from_os_error
from engine.pipeline.faces import told
from engine.units import format_duration

_ENDINGS = (".html", ".htm")
#: Moves the edge between a pair's pictures to where its slider is.
_SCRIPT = """
document.addEventListener("input", ({ target }) => {
  if (target.type === "range") target.parentElement.style.setProperty("--at", target.value + "%");
});
"""
_CARD = Template("""<article>
<h2>$name</h2>
$pair
<p class="meta">$meta</p>
</article>
""")
# Shown no larger than it is, but wide enough for its labels, and no higher than a screen.
_PAIR = Template("""<div class="pair"
style="aspect-ratio: $width / $height; width: min(max(${width}px, 12rem), 80vh * $ratio)">
<figure class="before"><img alt="$name before" src="$before">$faces<figcaption>before</figcaption></figure>
<figure class="after"><img alt="$name after" src="$after"><figcaption>after</figcaption></figure>
<input type="range" min="0" max="100" value="50" aria-label="$name: where before ends and after begins, in percent">
</div>""")


def check_page(path: Path, *, overwrite: bool = False, option: str = "--report") -> None:
    """Find out, before the work, whether a page could be written; one of an earlier run is replaced.

    Args:
        path: of the page.
        overwrite: whether a file that is something else is replaced, too.
        option: that the page was named with.
    Raises:
        OutputError: another ending, a file that is something else, or a folder that is missing or read-only.
    """
    if path.suffix.lower() not in _ENDINGS:
        found = path.suffix or "no ending"
        raise OutputError("no name of a page", where=path, expected=" or ".join(_ENDINGS), found=found)
    if not path.parent.is_dir():
        raise OutputError("no such folder", where=path.parent, fix="create it first")
    if path.is_dir() or (path.exists() and not overwrite and not _is_ours(path)):
        raise OutputError("exists already", where=path, fix=f"choose another name for {option}")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise from_os_error(error, path.parent, "write the page") from error


def page_style() -> str:
    """Return the style that all pages of commands share."""
    return (files("engine.cli") / "report.css").read_text("utf-8")


class ReportPage:
    """The page of a run; `add` every outcome, then `write` it.

    Args:
        path: of the page.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cards = tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self) -> ReportPage:
        return self

    def __exit__(self, *_: object) -> None:
        self._cards.close()

    def add(self, outcome: Outcome) -> None:
        """Add a photo; one that failed is told when the page is written."""
        if outcome.before is not None and outcome.after is not None:
            self._cards.write(_encoded(_card(outcome, outcome.before, outcome.after)))

    def write(self, tally: RunSummary, facts: Mapping[str, Any]) -> None:
        """Write the page, whole or not at all.

        Args:
            tally: of all outcomes.
            facts: the run's settings, by name.
        Raises:
            OutputError: it cannot be written.
        """
        page = Template((files("engine.cli") / "report.html").read_text("utf-8"))
        digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
        marker = "<!-- cards -->"
        head, tail = page.substitute(
            title="Restored photos",
            style=page_style(),
            face_style=face_style(),
            generator=APP_NAME,
            script=_SCRIPT,
            script_hash=f"sha256-{digest}",
            summary=escape(tally.summary()),
            facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items()),
            failures=_failures(tally),
            cards=marker,
        ).rsplit(marker, 1)
        self._cards.seek(0)
        with atomic_write(self._path, "write the report") as file:
            file.write(_encoded(head))
            shutil.copyfileobj(self._cards, file)
            file.write(_encoded(tail))


def _card(outcome: Outcome, before: bytes, after: bytes) -> str:
    name = escape(str(outcome.job.photo))
    width, height = Image.open(io.BytesIO(after)).size
    pair = _PAIR.substitute(
        name=name,
        width=width,
        height=height,
        ratio=f"{width / height:.4g}",
        before=_data_url(before),
        faces=boxes_html(_faces_of(outcome)),
        after=_data_url(after),
    )
    return _CARD.substitute(name=name, pair=pair, meta="<br>".join(map(escape, _meta(outcome))))


def _meta(outcome: Outcome) -> list[str]:
    lines = [f"{path}: was there already" for path in outcome.job.done]
    for report in outcome.reports:
        lines.append(f"{report['output']}: {sizes_and_time(report)}, seed {report['settings']['seed']}")
    if (faces := _faces_of(outcome)) is not None:
        lines.append(told(faces) + ("; --leave-face N leaves one out" if len(faces["found"]) > 0 else ""))
    return lines


def _faces_of(outcome: Outcome) -> Mapping[str, Any] | None:
    """Return what the first result's metadata says of the photo's faces; None where nobody looked for them."""
    return outcome.reports[0].get("faces") if outcome.reports else None


def sizes_and_time(report: Mapping[str, Any]) -> str:
    """Return a result's sizes and time as a person reads them, from its entry in `Outcome.reports`."""
    (width, height), (new_width, new_height) = report["input_size"], report["output_size"]
    return f"{width} × {height} to {new_width} × {new_height}, {format_duration(report['total_ms'] / 1e3)}"


def _failures(tally: RunSummary) -> str:
    if not tally.failed:
        return ""
    rows = "".join(f"<li><b>{escape(photo)}</b>: {escape(reason(error))}</li>" for photo, error in tally.failed)
    return f'<section class="failed"><h2>Failed</h2><ul>{rows}</ul></section>'


def _encoded(text: str) -> bytes:
    """Return text as UTF-8; what of a name is none is shown as a question mark."""
    return text.encode("utf-8", "replace")


def _data_url(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return f'<meta name="generator" content="{APP_NAME}">'.encode() in file.read(1000)
