"""What plans need for activations, kept in the cache: only an opened plan tells, and opening takes seconds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from engine.bundle.manifest import TrtEngine
from engine.bundle.profiles import choose_profile
from engine.bundle.storage import write_cache
from engine.memory.residency import Activations


class PlanMemory(BaseModel):
    """What a plan needs beside its weights.

    Attributes:
        profiles: bytes under each of its optimization profiles, with all weights on the device.
        streaming_bytes: more, where weights are streamed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    profiles: tuple[int, ...]
    streaming_bytes: int = 0

    def at(self, plan: TrtEngine, sizes: Sequence[Mapping[str, int]], *, where: str) -> Activations:
        """Return what the largest of some sizes needs.

        Args:
            plan: that this is of.
            sizes: as what the graph's symbols stand for.
            where: the graph, for the error.
        Raises:
            BackendError: the plan does not take one of them.
        """
        indices = [choose_profile(plan.profiles, symbols, where=where) for symbols in sizes]
        return Activations(max(self.profiles[index] for index in indices), self.streaming_bytes)


class MemoryNotes:
    """Notes by plans' keys: what this library said on this kind of GPU.

    Args:
        file: that they are kept in; one that cannot be read or written costs time, nothing else.
    """

    _TYPE = TypeAdapter(dict[str, PlanMemory])

    def __init__(self, file: Path) -> None:
        self._file = file
        self._notes: dict[str, PlanMemory] = {}
        with contextlib.suppress(OSError, ValidationError):
            self._notes = self._TYPE.validate_json(file.read_bytes())

    def get(self, plan: TrtEngine) -> PlanMemory | None:
        """Return the note of a plan, None if it was not opened yet."""
        found = self._notes.get(plan.key)
        return found if found is not None and len(found.profiles) == len(plan.profiles) else None

    def keep(self, plan: TrtEngine, memory: PlanMemory, keys: Collection[str]) -> None:
        """Note what a plan needs.

        Args:
            plan: that was opened.
            memory: as it said.
            keys: of all plans of the bundle; notes of others are dropped.
        """
        if self._notes.get(plan.key) == memory:
            return
        self._notes = {key: note for key, note in self._notes.items() if key in keys} | {plan.key: memory}
        plain = {key: note.model_dump(mode="json") for key, note in self._notes.items()}
        write_cache(self._file, json.dumps(plain).encode())
