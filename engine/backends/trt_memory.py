"""What plans need for activations, kept in the cache: only an opened plan tells, and opening takes seconds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from engine.backends.trt_library import WEIGHT_STREAMING
from engine.bundle.manifest import TrtEngine
from engine.bundle.profiles import choose_profile
from engine.bundle.storage import write_cache
from engine.memory.residency import Activations

#: Sizes whose needs are noted for a plan; those that were asked for last.
_SIZES_NOTED = 100


class PlanMemory(BaseModel):
    """What a plan needs beside its weights.

    Attributes:
        profiles: bytes at the largest size of each of its optimization profiles, with all weights on the device.
        streaming_bytes: more, where weights are streamed.
        sizes: bytes at the sizes that an opened plan was asked about, by `size_key`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    profiles: tuple[int, ...]
    streaming_bytes: int = 0
    sizes: dict[str, int] = {}

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
        needs = (self.sizes.get(size_key(size), self.profiles[i]) for i, size in zip(indices, sizes, strict=True))
        # Streaming takes more, and how much depends on how many weights are streamed.
        is_exact = self.knows(sizes) or WEIGHT_STREAMING in plan.flags
        return Activations(max(needs), self.streaming_bytes, is_exact)

    def knows(self, sizes: Sequence[Mapping[str, int]]) -> bool:
        """Tell whether the plan was asked about all of some sizes."""
        return all(size_key(symbols) in self.sizes for symbols in sizes)

    def with_sizes(self, sizes: Mapping[str, int]) -> PlanMemory:
        """Return this with what some more sizes need."""
        known = {key: value for key, value in self.sizes.items() if key not in sizes} | dict(sizes)
        return self.model_copy(update={"sizes": dict(list(known.items())[-_SIZES_NOTED:])})


def size_key(symbols: Mapping[str, int]) -> str:
    """Return a size as notes name it, such as "B=2 h=128 w=96 k=1"."""
    return " ".join(f"{name}={value}" for name, value in symbols.items())


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
        known = self._notes.get(plan.key)
        if known is not None and known.profiles == memory.profiles:
            memory = memory.with_sizes({**known.sizes, **memory.sizes})
        if known == memory:
            return
        self._notes = {key: note for key, note in self._notes.items() if key in keys} | {plan.key: memory}
        plain = {key: note.model_dump(mode="json") for key, note in self._notes.items()}
        write_cache(self._file, json.dumps(plain).encode())
