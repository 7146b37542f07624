"""A graph of the VAE a few rows at a time, exactly: segment by segment, each map held whole between two segments.

A graph that sees a whole photo holds several of its widest maps at once, and attention of every cell with every
cell. Tiles need little, but their norms see no more than a tile. Here each segment of the graph (see `VaeSegment` in
`engine.bundle.manifest`) runs on slices of rows, with the rows beside them that its convolution reaches; its norm is
given the whole map's mean and deviation, which are summed while the map is written. So nothing is approximate, nothing
is computed twice but a slice's halo, and two or three maps are held instead of a graph's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.bundle.graphspec import DType, resolve
from engine.bundle.manifest import STATISTICS, Norm, VaeSegment
from engine.device.interface import Array, host_dtype


class SegmentRunner(Protocol):
    """A segment's opened graph."""

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run it on named inputs."""
        ...


#: Opens the graph of a segment for as long as it runs.
OpenSegment = Callable[[VaeSegment], AbstractContextManager[SegmentRunner]]

#: Of the widest map in a slice, or of attention's scores, unless a single row is more.
_SLICE_BYTES = 64 << 20
#: Beside the maps: a slice's values inside a segment, and what ONNX Runtime keeps of them.
_BESIDE_BYTES = 8 * _SLICE_BYTES
_FLOAT = np.dtype(np.float32).itemsize


@dataclass(frozen=True)
class SlicedVae:
    """The VAE works in slices of rows, exactly.

    Attributes:
        slice_bytes: of the widest map in a slice.
        min_slices: into which every map is cut, if it has so many rows: small ones would be a single slice.
    """

    slice_bytes: int = _SLICE_BYTES
    min_slices: int = 1


def peak_bytes(segments: Sequence[VaeSegment], shape: Sequence[int]) -> int:
    """Return what `run_slices` holds at most for an image of a shape."""
    most = 0
    shapes = _shapes(segments, shape)
    sizes = {name: math.prod(shape) * _FLOAT for name, shape in shapes.items()}
    live = {segments[0].spec.inputs[0].name}
    for segment, ended in zip(segments, _ended(segments), strict=True):
        output = segment.spec.outputs[0].name
        reused = any(shapes[name] == shapes[output] for name in ended if name not in segment.whole)
        most = max(most, sum(sizes[name] for name in live) + (0 if reused else sizes[output]))
        live = (live | {output}) - set(ended)
    return most + _BESIDE_BYTES


def widest_map_bytes(segments: Sequence[VaeSegment], shape: Sequence[int]) -> int:
    """Return the bytes of the largest map between two segments for an image of a shape."""
    return max(map(math.prod, _shapes(segments, shape).values())) * _FLOAT


def run_slices(
    segments: Sequence[VaeSegment],
    image: Array,
    open_segment: OpenSegment,
    mode: SlicedVae,
    on_slice: Callable[[int, int], None] | None = None,
) -> Array:
    """Run a graph's segments, one after the other.

    Args:
        segments: of the graph.
        image: its input; it is not changed.
        open_segment: as above.
        mode: how large the slices are.
        on_slice: told how many slices are done, and how many there are.
    Returns:
        The graph's output.
    """
    source = segments[0].spec.inputs[0].name
    shapes = _shapes(segments, image.shape)
    normed = {segment.norm.map: segment.norm for segment in segments if segment.norm is not None}
    maps: dict[str, Array] = {source: image}
    statistics: dict[str, _Statistics] = {}
    cuts = [_Slices(segment, shapes, mode) for segment in segments]
    done, total = 0, sum(map(len, cuts))
    for segment, slices, ended in zip(segments, cuts, _ended(segments), strict=True):
        output = segment.spec.outputs[0]
        free = [maps[name] for name in ended if name != source and name not in segment.whole]
        result = next((array for array in free if _fits(array, shapes[output.name], output.dtype)), None)
        if result is None:
            result = np.empty(shapes[output.name], host_dtype(output.dtype))
        fixed = statistics[segment.norm.map].as_inputs() if segment.norm is not None else {}
        if output.name in normed:
            statistics[output.name] = _Statistics(normed[output.name], shapes[output.name])
        with open_segment(segment) as runner:
            writer = _DelayedWriter(slices.rows_of(result))
            for rows in slices:
                values = runner.infer({**slices.inputs(maps, rows), **fixed})[output.name]
                values = values[:, :, rows.skip : rows.skip + rows.count]
                if output.name in statistics:
                    statistics[output.name].add(values)
                writer.write(rows.start, values)
                done += 1
                if on_slice is not None:
                    on_slice(done, total)
            writer.flush()
        maps[output.name] = result
        for name in ended:
            del maps[name]
    return maps[segments[-1].spec.outputs[0].name]


def _ended(segments: Sequence[VaeSegment]) -> list[list[str]]:
    """Return for each segment the maps that no later one takes."""
    last = {name: index for index, segment in enumerate(segments) for name in segment.maps}
    return [[name for name, at in last.items() if at == index] for index in range(len(segments))]


@dataclass(frozen=True)
class _Slice:
    """Rows of a segment's result, and those of its maps that it sees for them.

    Attributes:
        start, count: of the result's rows.
        first, stop: of a map's rows.
        skip: rows of what the segment gives that lie before the slice.
    """

    start: int
    count: int
    first: int
    stop: int
    skip: int


class _Slices:
    """The slices of a segment over its maps."""

    def __init__(self, segment: VaeSegment, shapes: Mapping[str, tuple[int, ...]], mode: SlicedVae) -> None:
        self._segment = segment
        names = segment.maps
        result = shapes[segment.spec.outputs[0].name]
        self._by_cells = bool(segment.whole)
        if self._by_cells:  # every row is one cell, and meets all cells
            self._rows = result[2] * result[3]
            row_bytes, self._ratio = _FLOAT * self._rows, 1.0
        else:
            self._rows = result[2]
            self._ratio = shapes[names[0]][2] / result[2]
            widest = [result, *(shapes[name] for name in names)]
            row_bytes = max(_FLOAT * math.prod(shape) // result[2] for shape in widest)
        count = max(1, min(mode.slice_bytes // row_bytes, self._rows // mode.min_slices))
        # An even number, so that a halved map's slices begin at whole rows of it, and all slices are about as large.
        count += count % 2
        number = math.ceil(self._rows / count)
        self._count = 2 * math.ceil(self._rows / number / 2)

    def __len__(self) -> int:
        return math.ceil(self._rows / self._count)

    def __iter__(self) -> Iterator[_Slice]:
        above, below = self._segment.halo
        for start in range(0, self._rows, self._count):
            count = min(self._count, self._rows - start)
            top, bottom = int(start * self._ratio), int((start + count) * self._ratio)
            source_rows = int(self._rows * self._ratio)
            first, stop = max(0, top - above), min(source_rows, bottom + below)
            yield _Slice(start, count, first, stop, int((top - first) / self._ratio))

    def inputs(self, maps: Mapping[str, Array], rows: _Slice) -> dict[str, Array]:
        """Return a slice's rows of the maps that the segment takes."""
        return {
            name: maps[name]
            if name in self._segment.whole
            else np.ascontiguousarray(self.rows_of(maps[name])[:, :, rows.first : rows.stop])
            for name in self._segment.maps
        }

    def rows_of(self, array: Array) -> Array:
        """Return a map as the rows that are sliced: itself, or every cell as a row."""
        return array.reshape(*array.shape[:2], -1, 1) if self._by_cells else array


class _DelayedWriter:
    """Writes a slice when the next one has been read: the result may lie in a map that is still read."""

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
    """Mean and deviation of a map's groups, summed slice by slice.

    Args:
        norm: that they are for.
        shape: of the map.
    """

    def __init__(self, norm: Norm, shape: Sequence[int]) -> None:
        self._norm, self._shape = norm, shape
        self._sums, self._squares = np.zeros((2, shape[0], norm.groups))

    def add(self, values: Array) -> None:
        """Add a slice, f[B,C,rows,columns]: its rows in float32, their sums in float64."""
        wide = values.astype(np.float32, copy=False)
        groups = (wide.shape[0], self._norm.groups, -1)
        self._sums += wide.sum(axis=3).reshape(groups).sum(axis=2, dtype=np.float64)
        self._squares += np.einsum("bcrw,bcrw->bcr", wide, wide).reshape(groups).sum(axis=2, dtype=np.float64)

    def as_inputs(self) -> dict[str, NDArray[np.float32]]:
        """Return the segment's `STATISTICS`, f32[B,C,1,1] each."""
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


def _fits(array: Array, shape: Sequence[int], dtype: DType) -> bool:
    return array.shape == tuple(shape) and array.dtype == host_dtype(dtype)


def _shapes(segments: Sequence[VaeSegment], shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all maps, by their names, for the graph's input of a shape."""
    shapes = {segments[0].spec.inputs[0].name: tuple(shape)}
    for segment in segments:
        first, output = shapes[segment.maps[0]], segment.spec.outputs[0]
        if segment.whole:
            shapes[output.name] = first
        else:
            shapes[output.name] = resolve(output.shape, segment.spec.sizes_of({segment.maps[0]: first}))
    return shapes
