"""A graph of the VAE a few rows at a time, exactly: piece by piece, each map held whole between two pieces.

A graph that sees a whole photo holds several of its widest maps at once, and attention of every cell with every
cell. Tiles need little, but their norms see no more than a tile. Here each piece of the graph (see `Piece` in
`engine.bundle.manifest`) runs over bands of rows, with the rows beside them that its convolution reaches; its norm is
given the whole map's mean and deviation, which are summed while the map is written. So nothing is approximate, nothing
is computed twice but a band's halo, and two or three maps are held instead of a graph's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.bundle.graphspec import resolve
from engine.bundle.manifest import STATISTICS, Norm, Piece
from engine.device.interface import Array


class PieceRunner(Protocol):
    """A piece's opened graph."""

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run it on named inputs."""
        ...


#: Opens the graph of a piece for as long as it runs.
OpenPiece = Callable[[Piece], AbstractContextManager[PieceRunner]]

#: Of the widest map in a band, or of attention's scores, unless a single row is more.
_BAND_BYTES = 64 << 20
#: Beside the maps: a band's values inside a piece, and what ONNX Runtime keeps of them.
_BESIDE_BYTES = 8 * _BAND_BYTES
_FLOAT = np.dtype(np.float32).itemsize


@dataclass(frozen=True)
class SlicedVae:
    """Work exactly, in bands of rows.

    Attributes:
        band_bytes: of the widest map in a band.
        min_bands: into which every map is cut, if it has so many rows: small ones would be a single band.
    """

    band_bytes: int = _BAND_BYTES
    min_bands: int = 1


def peak_bytes(pieces: Sequence[Piece], shape: Sequence[int]) -> int:
    """Return what `run_slices` holds at most for an image of a shape."""
    most = 0
    shapes = _shapes(pieces, shape)
    sizes = {name: math.prod(shape) * _FLOAT for name, shape in shapes.items()}
    live = {pieces[0].spec.inputs[0].name}
    for piece, ended in zip(pieces, _ended(pieces), strict=True):
        output = piece.spec.outputs[0].name
        reused = any(shapes[name] == shapes[output] for name in ended if name not in piece.whole)
        most = max(most, sum(sizes[name] for name in live) + (0 if reused else sizes[output]))
        live = (live | {output}) - set(ended)
    return most + _BESIDE_BYTES


def run_slices(
    pieces: Sequence[Piece],
    image: Array,
    open_piece: OpenPiece,
    way: SlicedVae,
    on_band: Callable[[int, int], None] | None = None,
) -> Array:
    """Run a graph's pieces, one after the other.

    Args:
        pieces: of the graph.
        image: its input; it is not changed.
        open_piece: as above.
        way: how many rows go at once.
        on_band: told how many bands of rows are done, and how many there are.
    Returns:
        The graph's output.
    """
    source = pieces[0].spec.inputs[0].name
    shapes = _shapes(pieces, image.shape)
    normed = {piece.norm.map: piece.norm for piece in pieces if piece.norm is not None}
    maps: dict[str, Array] = {source: image}
    statistics: dict[str, _Statistics] = {}
    jobs = [_Bands(piece, shapes, way) for piece in pieces]
    done, total = 0, sum(len(job) for job in jobs)
    for piece, job, ended in zip(pieces, jobs, _ended(pieces), strict=True):
        output = piece.spec.outputs[0]
        free = [maps[name] for name in ended if name != source and name not in piece.whole]
        result = next((each for each in free if _fits(each, shapes[output.name], output.dtype)), None)
        if result is None:
            result = np.empty(shapes[output.name], output.dtype)
        fixed = statistics[piece.norm.map].as_inputs() if piece.norm is not None else {}
        if output.name in normed:
            statistics[output.name] = _Statistics(normed[output.name], shapes[output.name])
        with open_piece(piece) as runner:
            writer = _Behind(job.rows_of(result))
            for band in job:
                given = runner.infer({**job.inputs(maps, band), **fixed})[output.name]
                values = given[:, :, band.skip : band.skip + band.count]
                if output.name in statistics:
                    statistics[output.name].add(values)
                writer.write(band.start, values)
                done += 1
                if on_band is not None:
                    on_band(done, total)
            writer.flush()
        maps[output.name] = result
        for name in ended:
            del maps[name]
    return maps[pieces[-1].spec.outputs[0].name]


def _ended(pieces: Sequence[Piece]) -> list[list[str]]:
    """Return for each piece the maps that no later one takes."""
    last = {name: index for index, piece in enumerate(pieces) for name in piece.maps}
    return [[name for name, at in last.items() if at == index] for index in range(len(pieces))]


@dataclass(frozen=True)
class _Band:
    """Rows of a piece's result, and those of its maps that it sees for them.

    Attributes:
        start, count: of the result's rows.
        first, stop: of a map's rows.
        skip: rows of what the piece gives that lie before the band.
    """

    start: int
    count: int
    first: int
    stop: int
    skip: int


class _Bands:
    """The bands of a piece over its maps."""

    def __init__(self, piece: Piece, shapes: Mapping[str, tuple[int, ...]], way: SlicedVae) -> None:
        self._piece = piece
        names = piece.maps
        result = shapes[piece.spec.outputs[0].name]
        self._by_cells = bool(piece.whole)
        if self._by_cells:  # every row is one cell, and meets all cells
            self._rows = result[2] * result[3]
            row_bytes, self._ratio = _FLOAT * self._rows, 1.0
        else:
            self._rows = result[2]
            self._ratio = shapes[names[0]][2] / result[2]
            widest = [result, *(shapes[name] for name in names)]
            row_bytes = max(_FLOAT * math.prod(shape) // result[2] for shape in widest)
        count = max(1, min(way.band_bytes // row_bytes, self._rows // way.min_bands))
        # An even number, so that a halved map's bands begin at whole rows of it, and all bands are about as large.
        count += count % 2
        number = math.ceil(self._rows / count)
        self._count = 2 * math.ceil(self._rows / number / 2)

    def __len__(self) -> int:
        return math.ceil(self._rows / self._count)

    def __iter__(self) -> Iterator[_Band]:
        above, below = self._piece.halo
        for start in range(0, self._rows, self._count):
            count = min(self._count, self._rows - start)
            top, bottom = int(start * self._ratio), int((start + count) * self._ratio)
            source_rows = int(self._rows * self._ratio)
            first, stop = max(0, top - above), min(source_rows, bottom + below)
            yield _Band(start, count, first, stop, int((top - first) / self._ratio))

    def inputs(self, maps: Mapping[str, Array], band: _Band) -> dict[str, Array]:
        """Return a band's rows of the maps that the piece takes."""
        return {
            name: maps[name]
            if name in self._piece.whole
            else np.ascontiguousarray(self.rows_of(maps[name])[:, :, band.first : band.stop])
            for name in self._piece.maps
        }

    def rows_of(self, each: Array) -> Array:
        """Return a map as the rows that bands are of: itself, or every cell as a row."""
        return each.reshape(*each.shape[:2], -1, 1) if self._by_cells else each


class _Behind:
    """Writes a band when the next one has been read: the result may lie in a map that is still read."""

    def __init__(self, result: Array) -> None:
        self._result = result
        self._waiting: tuple[int, Array] | None = None

    def write(self, start: int, values: Array) -> None:
        self.flush()
        self._waiting = (start, values)

    def flush(self) -> None:
        if self._waiting is not None:
            start, values = self._waiting
            self._result[:, :, start : start + values.shape[2]] = values
            self._waiting = None


class _Statistics:
    """Mean and deviation of a map's groups, summed band by band.

    Args:
        norm: that they are for.
        shape: of the map.
    """

    def __init__(self, norm: Norm, shape: Sequence[int]) -> None:
        self._norm, self._shape = norm, shape
        self._sums, self._squares = np.zeros((2, shape[0], norm.groups))

    def add(self, values: Array) -> None:
        """Add a band, f[B,C,rows,columns]: its rows in float32, their sums in float64."""
        wide = values.astype(np.float32, copy=False)
        groups = (wide.shape[0], self._norm.groups, -1)
        self._sums += wide.sum(axis=3).reshape(groups).sum(axis=2, dtype=np.float64)
        self._squares += np.einsum("bcrw,bcrw->bcr", wide, wide).reshape(groups).sum(axis=2, dtype=np.float64)

    def as_inputs(self) -> dict[str, NDArray[np.float32]]:
        """Return the piece's `STATISTICS`, f32[B,C,1,1] each."""
        batch, channels, height, width = self._shape
        of_group = channels // self._norm.groups * height * width
        mean = self._sums / of_group
        variance = np.maximum(self._squares / of_group - mean**2, 0.0)
        inverse = 1.0 / np.sqrt(variance + self._norm.eps)
        return {
            name: np.repeat(values, channels // self._norm.groups, axis=1)
            .reshape(batch, channels, 1, 1)
            .astype(np.float32)
            for name, values in zip(STATISTICS, (mean, inverse), strict=True)
        }


def _fits(each: Array, shape: Sequence[int], dtype: str) -> bool:
    return each.shape == tuple(shape) and each.dtype == np.dtype(dtype)


def _shapes(pieces: Sequence[Piece], shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all maps, by their names, for the graph's input of a shape."""
    shapes = {pieces[0].spec.inputs[0].name: tuple(shape)}
    for piece in pieces:
        first, output = shapes[piece.maps[0]], piece.spec.outputs[0]
        if piece.whole:
            shapes[output.name] = first
        else:
            shapes[output.name] = resolve(output.shape, piece.spec.sizes_of({piece.maps[0]: first}))
    return shapes
