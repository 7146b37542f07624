"""The folder of a build: one build at a time, room on the disk, what lies in the bundle's place, and the last move."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from engine.bundle.files import MANIFEST
from engine.bundle.manifest import Manifest, open_bundle
from engine.errors import BuildError, BundleError, OutputError
from engine.units import format_bytes
from export.build.build_plan import BuildPlan

#: In the folder of a build, what it has finished.
STATE = "state.json"


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other builds of a bundle out.

    Raises:
        BuildError: another one is under way.
    """
    file = output.parent / f".{output.name}.lock"
    lock = FileLock(file, timeout=0)
    try:
        with lock:
            try:
                yield
            finally:
                # While it is held: whoever opens it now fails on it, whoever comes later makes a new one.
                with suppress(OSError):  # Windows keeps an open file
                    file.unlink()
    except Timeout:
        raise BuildError(
            "another build of this bundle is under way", where=output, fix="wait for it, or choose another --output"
        ) from None


def present_manifest(output: Path) -> Manifest | None:
    """Return the manifest of the bundle in place, None if there is none or it is not whole.

    Raises:
        OutputError: something that is no bundle is in its place.
    """
    if not output.exists():
        return None
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST).is_file()):
        raise OutputError(
            "something that is no bundle lies there", where=output, fix="choose another --output, or move it away"
        )
    try:
        manifest = open_bundle(output).manifest
    except BundleError:
        return None
    (output / STATE).unlink(missing_ok=True)  # of a build that was killed when all but this was done
    return manifest


def check_room(plan: BuildPlan, partial: Path) -> int:
    """Return the bytes that there are for a build, those that a stopped one has taken included."""
    have = shutil.disk_usage(partial.parent).free
    have += sum(file.stat().st_size for file in partial.glob("*")) if partial.is_dir() else 0
    if have < plan.write_bytes:
        raise OutputError(
            "not enough room on the disk",
            where=plan.request.output,
            expected=format_bytes(plan.write_bytes),
            found=f"{format_bytes(have)} free",
            fix="free some space, or choose another disk with --output",
        )
    return have


def partial_folder(output: Path) -> Path:
    """Return the folder that a bundle is built in."""
    return output.parent / f".{output.name}.building"


def swap(partial: Path, output: Path) -> None:
    """Put a finished build in the bundle's place; where that fails, what was there is there again.

    A kill between any two of its acts loses nothing: `repair` puts the old bundle back, and as the state is removed
    last, the next build goes on behind the last stage of this one.
    """
    old = _old_folder(output)
    if output.exists():
        output.rename(old)
    try:
        partial.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    (output / STATE).unlink()
    shutil.rmtree(old, ignore_errors=True)


def repair(output: Path) -> None:
    """Put right what a swap that was killed has left: nothing in the bundle's place, or something beside it."""
    old = _old_folder(output)
    if old.exists() and not output.exists():
        old.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _old_folder(output: Path) -> Path:
    """Return where the bundle that is replaced lies meanwhile."""
    return output.parent / f".{output.name}.old"
