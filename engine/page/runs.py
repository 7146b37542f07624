"""A run: some photos of one visitor on their way over the desk, told as it goes."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import RestoreError
from engine.page.desk import CancellationError, Desk, Ticket
from engine.page.sessions import Result, Session
from engine.settings import FaceSettings, Settings

#: Seconds between two tellings of the same photo: a person reads no faster.
_TELL_S = 0.2


@dataclass(frozen=True)
class Event:
    """What happened: a photo is further, restored, or failed.

    Attributes:
        ticket: of the photo.
        place: which of how many, as "2 of 5"; empty if it is the only one.
        result: if it is restored.
        error: if it failed.
    """

    ticket: Ticket
    place: str
    result: Result | None = None
    error: RestoreError | None = None


async def restore(
    desk: Desk,
    session: Session,
    photos: Sequence[Path],
    settings: Settings,
    faces: FaceSettings | None = None,
    preset: str | None = None,
) -> AsyncIterator[Event]:
    """Restore photos with the same settings, one after the other, and yield what happens.

    Where nobody asks for more, or the run's name is cancelled at the desk, the rest is given up.

    Args:
        desk: that does it.
        session: whose results they become.
        photos: their files.
        settings: of all of them.
        faces: how their faces are restored; None if they are not.
        preset: whose settings they are; None for the bundle's own.
    Raises:
        UsageError: too many photos are waiting.
    """
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def on_change() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to be told
            loop.call_soon_threadsafe(changed.set)

    run = secrets.token_hex(8)
    tickets = [
        Ticket(run, photo, session.new_output(photo), settings, on_change, faces=faces, preset=preset)
        for photo in photos
    ]
    desk.submit(tickets)
    session.runs.add(run)
    try:
        for index, ticket in enumerate(tickets):
            place = f"{index + 1} of {len(tickets)}" if len(tickets) > 1 else ""
            while ticket.outcome is None:
                yield Event(ticket, place)
                await _next_change(changed, ticket)
            yield await asyncio.to_thread(_done, session, ticket, place)
    finally:
        session.runs.discard(run)
        desk.cancel(run)


async def _next_change(changed: asyncio.Event, ticket: Ticket) -> None:
    """Wait until a ticket has changed; progress, but not its end, is gathered for a moment."""
    await changed.wait()
    changed.clear()
    if ticket.outcome is None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TELL_S):
                while ticket.outcome is None:
                    await changed.wait()
                    changed.clear()


def _done(session: Session, ticket: Ticket, place: str) -> Event:
    """Return what became of a ticket; a result joins its session's."""
    outcome = ticket.outcome
    assert outcome is not None
    if outcome.error is not None:
        return Event(ticket, place, error=outcome.error)
    assert outcome.before is not None
    assert outcome.after is not None
    folder = ticket.output.parent
    before, after = folder / "before.webp", folder / "after.webp"
    try:
        before.write_bytes(outcome.before)
        after.write_bytes(outcome.after)
    except FileNotFoundError:  # the session has ended meanwhile
        return Event(ticket, place, error=CancellationError("cancelled"))
    (report,) = outcome.reports
    result = Result(
        photo=ticket.photo,
        output=ticket.output,
        before=before,
        after=after,
        settings=ticket.settings,
        report=report,
        notes=tuple(ticket.notes),
        faces=ticket.faces,
        preset=ticket.preset,
    )
    session.results.append(result)
    return Event(ticket, place, result=result)
