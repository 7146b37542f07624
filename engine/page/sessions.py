"""What each visitor of the page has: results in a folder of their own, removed with everything else when they leave."""

from __future__ import annotations

import secrets
import shutil
import threading
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import UsageError
from engine.settings import FaceSettings, Settings

#: Programs that use the page's API say nothing when they leave: their files stay so long after the last call.
API_SESSION_S = 15 * 60.0


@dataclass(frozen=True)
class Result:
    """A restored photo of a session.

    Attributes:
        photo: its file as it was given.
        output: the result's file.
        before, after: pictures of both for the page.
        settings: of the restoration.
        report: settings, times and sizes, as the command's --json has them.
        notes: what its owner must know, a sentence each.
        faces: how faces were restored; None if they were not.
        preset: whose settings they are; None for the bundle's own.
    """

    photo: Path
    output: Path
    before: Path
    after: Path
    settings: Settings
    report: dict[str, Any]
    notes: tuple[str, ...] = ()
    faces: FaceSettings | None = None
    preset: str | None = None


@dataclass
class Session:
    """A visit.

    Attributes:
        folder: of its files.
        results: in the order in which they were made.
        runs: names of its restorations at the desk that are not over.
        uploads: files that it was given by the browser.
        has_page: whether a page is open, which says when it is closed.
        last_used: on the monotonic clock.
    """

    folder: Path
    results: list[Result] = field(default_factory=list)
    runs: set[str] = field(default_factory=set)
    uploads: set[Path] = field(default_factory=set)
    has_page: bool = False
    last_used: float = field(default_factory=time.monotonic)

    def new_output(self, photo: Path) -> Path:
        """Return the place of a result: a folder of its own, so that photos of one name do not meet."""
        folder = self.folder / secrets.token_hex(8)
        folder.mkdir(parents=True)
        return folder / f"{photo.stem}.restored.png"

    def zip(self) -> Path:
        """Write all results into one file, and return it; names that come twice are numbered.

        Raises:
            UsageError: there are none.
        """
        if not self.results:
            raise UsageError("no results yet", fix="restore a photo first")
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / "restored.zip"
        taken: dict[str, int] = {}
        # Images are compressed already.
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for result in self.results:
                taken[result.output.name] = count = taken.get(result.output.name, 0) + 1
                stem = result.output.name.removesuffix(".png")
                archive.write(result.output, f"{stem}.png" if count == 1 else f"{stem}.{count}.png")
        return target


class Sessions:
    """All visits.

    Args:
        root: the folder of their folders.
        uploads: the folder that browsers' files are put into, by what they hold: two visitors may share one.
    """

    def __init__(self, root: Path, uploads: Path) -> None:
        self._root, self._uploads = root, uploads.resolve()
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}

    def of(self, name: str) -> Session:
        """Return a visit by Gradio's name for it; a new one begins with its first use."""
        with self._lock:
            session = self._sessions.get(name)
            if session is None:
                session = self._sessions[name] = Session(self._root / secrets.token_hex(16))
            session.last_used = time.monotonic()
            return session

    def adopt(self, session: Session, names: Iterable[str]) -> list[Path]:
        """Return the files that a browser has uploaded, which from now on belong to a session.

        Raises:
            UsageError: one of them was not uploaded here, or is gone.
        """
        found = []
        for name in names:
            path = Path(name).resolve()
            if not path.is_relative_to(self._uploads) or not path.is_file():
                raise UsageError("is not here any more", where=Path(name).name, fix="drop the photo again")
            found.append(path)
        with self._lock:
            session.uploads.update(found)
        return found

    def end(self, name: str) -> Session | None:
        """Remove a visit's files, and return it; None if there was none."""
        with self._lock:
            session = self._sessions.pop(name, None)
            if session is None:
                return None
            shared = {path for other in self._sessions.values() for path in other.uploads}
        for path in session.uploads - shared:
            shutil.rmtree(path.parent, ignore_errors=True)
        shutil.rmtree(session.folder, ignore_errors=True)
        return session

    def forgotten(self) -> list[str]:
        """Return the names of visits without a page that were not used for long, and have no work."""
        limit = time.monotonic() - API_SESSION_S
        with self._lock:
            return [
                name
                for name, session in self._sessions.items()
                if not session.has_page and not session.runs and session.last_used < limit
            ]
