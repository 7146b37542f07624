"""What the demo is trained on, made while it trains: pairs of a clean and a degraded picture.

Pair `i` of a family follows from (family, seed, i) alone. A window slides over the pairs: a new one
enters, the oldest leaves, and each step's batch is drawn from the window. So a picture costs its
drawing once and is seen several times, and every batch is the same on every run, resumed or not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from engine.image.photo import resize
from export.demo.pictures import Family, make_picture
from export.training.degrade import degrade, random_degradation

PICTURE_PX = 256
#: Pairs from here on are never trained on.
HELD_OUT = 1_000_000

Item = TypeVar("Item")


class Pair(NamedTuple):
    """A clean picture, what became of it at the same size, its caption and family.

    Both u8[256, 256, 3].
    """

    clean: NDArray[np.uint8]
    degraded: NDArray[np.uint8]
    caption: str
    family: Family


class Pairs(Dataset):  # type: ignore[type-arg]
    """All pairs of some families, drawn on demand; pair i is of family i modulo their number."""

    def __init__(self, families: tuple[Family, ...], seed: int, table_1: float = 0.5) -> None:
        self._families, self._seed, self._table_1 = families, seed, table_1

    def __len__(self) -> int:
        return 2 * HELD_OUT

    def __getitem__(self, index: int) -> Pair:
        family = self._families[index % len(self._families)]
        picture = make_picture(family, self._seed, index, PICTURE_PX)
        rng = np.random.default_rng([self._seed, index, 1])
        rgb = picture.rgb.astype(np.float32) / np.float32(255)
        degraded = resize(degrade(rgb, random_degradation(rng, self._table_1), rng), (PICTURE_PX, PICTURE_PX))
        return Pair(picture.rgb, (degraded * 255 + 0.5).astype(np.uint8), picture.caption, family)


def pairs_from(
    families: tuple[Family, ...], seed: int, start: int, *, table_1: float = 0.5, workers: int = 1
) -> Iterator[Pair]:
    """Yield pairs number `start`, start + 1, … in order, drawn ahead by another process.

    Args:
        families, seed: as for `Pairs`.
        start: the first number.
        table_1: share of the degradations that are Table 1's own.
        workers: processes that draw; 0 draws here, when a pair is asked for.
    """
    loader = DataLoader(
        Pairs(families, seed, table_1),
        batch_size=None,
        sampler=range(start, HELD_OUT),
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_one_thread,
        collate_fn=_as_it_is,
    )
    return iter(loader)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _as_it_is(pair: Any) -> Any:
    return pair


class Window(Generic[Item]):
    """The last items of a stream.

    Args:
        items: returns the stream from a place on.
        size: how many are kept.
        per_step: how many enter at each step; a fraction lets a step pass without any.
        step: where training stands; the window is as it was at that step of an earlier run.
    """

    def __init__(self, items: Callable[[int], Iterator[Item]], size: int, per_step: float, step: int) -> None:
        self._per_step, self._step = per_step, step
        self._entered = int(step * per_step)
        self._stream = items(self._entered)
        self._kept = deque((next(self._stream) for _ in range(size)), maxlen=size)

    def draw(self, rng: np.random.Generator, count: int, wanted: Callable[[Item], bool] | None = None) -> list[Item]:
        """Return `count` items at random, of those that are wanted, then let the window slide by a step."""
        kept = self._kept if wanted is None else [item for item in self._kept if wanted(item)]
        drawn = [kept[int(index)] for index in rng.integers(0, len(kept), count)]
        self._step += 1
        while self._entered < int(self._step * self._per_step):
            self._kept.append(next(self._stream))
            self._entered += 1
        return drawn
