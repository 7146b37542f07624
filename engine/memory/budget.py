"""How a computer's memory is shared out. Every share of it stands here.

The shares add up to more than one: few restorations are bounded by all of them, and each bounds an estimate from above.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.memory.host_memory import available_memory_bytes, total_memory_bytes

_WEIGHTS = 0.7
_ACTIVATIONS = 0.5
#: Slices hold two or three whole maps, beside everything else of a large photo.
_SLICES = 0.25
#: A server's other requests, its weights and its photos are there too.
_SERVED_ATTENTION = 0.25
#: One photo's file in memory, before it is known what becomes of it.
_PHOTO_FILE = 0.5
#: Its colours and transparency as f32, and up to 8 bytes of its file.
_BYTES_PER_FILE_PIXEL = 4 * 4 + 8
#: While colours are fixed there are the photo, stage 1, the networks' output and the result as f32, and a few rows of
#: each; 53 bytes were measured.
BYTES_PER_PIXEL = 5 * 3 * 4


@dataclass(frozen=True)
class MemoryBudget:
    """What the parts of a restoration may take of a memory.

    Attributes:
        bytes: that are shared out.
    """

    bytes: int

    @classmethod
    def available(cls) -> MemoryBudget:
        """Return the budget of what this process may take now; to be asked once, before anything is loaded."""
        return cls(available_memory_bytes())

    @classmethod
    def total(cls) -> MemoryBudget:
        """Return the budget of all that this process may ever use: it is the same in every process of a server."""
        return cls(total_memory_bytes())

    @property
    def weights(self) -> int:
        """Bytes for the weights of all graphs that are open at once."""
        return int(_WEIGHTS * self.bytes)

    @property
    def activations(self) -> int:
        """Bytes for what a graph computes on a whole photo."""
        return int(_ACTIVATIONS * self.bytes)

    @property
    def slices(self) -> int:
        """Bytes for the VAE's maps where it runs in slices."""
        return int(_SLICES * self.bytes)

    @property
    def served_attention(self) -> int:
        """Bytes for one pass of the VAE's attention on a server."""
        return int(_SERVED_ATTENTION * self.bytes)

    @property
    def pixels(self) -> int:
        """How many pixels of a photo the networks may see, be it in tiles."""
        return self.bytes // BYTES_PER_PIXEL

    @property
    def file_pixels(self) -> int:
        """How many pixels a photo may have to be read at all."""
        return int(_PHOTO_FILE * self.bytes) // _BYTES_PER_FILE_PIXEL

    @staticmethod
    def photo_bytes(pixels: int) -> int:
        """Return what the arrays of a photo take, of as many pixels as the networks see."""
        return pixels * BYTES_PER_PIXEL

    @classmethod
    def for_weights(cls, needed_bytes: int) -> MemoryBudget:
        """Return the least budget whose share holds these weights."""
        return cls(int(needed_bytes / _WEIGHTS))
