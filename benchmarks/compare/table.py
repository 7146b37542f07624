"""A comparison as lines for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.compare.findings import RANGES, GraphReport, Layer, Spread
from engine.units import format_duration

#: Layers that are named in one line of the verdict.
_NAMED = 3
_COLUMNS = ("layer", "operator", "type", "max |x|", "examined", "error", "own", "")


def verdict_lines(report: GraphReport) -> list[str]:
    """Return what the comparison comes to, a finding a line."""
    lines = []
    breaking = [layer for layer in report.off if layer.breaks]
    off = [layer for layer in report.off if not layer.breaks]
    for layer in breaking[:_NAMED]:
        lines.append(
            f"breaks: {layer.label} makes {counts(layer.own_spread)}; the reference's values reach "
            f"{layer.reference.largest:.4g}, {holds(layer.type)}"
        )
    for layer in off[:_NAMED]:
        lines.append(f"off by itself: {layer.label} differs by {layer.own:.2g} (bound {layer.own_bound:g})")
    lines += _more(breaking, "that break") + _more(off, "that are off by themselves")
    first = report.first_not_finite
    if first is not None:
        lines.append(f"not finite from here on: {first.label}, {counts(first.examined)}")
    diverged = report.first_divergence
    if diverged is not None:
        lines.append(f"diverges from here on: {diverged.label}, error {diverged.error:.2g} (bound {diverged.bound:g})")
    beyond = report.beyond_fp16
    if beyond:
        most = max(beyond, key=lambda layer: layer.reference.largest)
        lines.append(
            f"beyond fp16: {len(beyond)} results of the reference are above {RANGES['fp16'][0]:.0f}, first "
            f"{beyond[0].label}, most {most.reference.largest:.4g} in {most.label}"
        )
    if report.agrees:
        lines.insert(0, "nothing is beyond a bound")
    last = [layer for layer in report.layers if layer.output in report.outputs]
    if last:
        lines.append(f"the graph's outputs differ by {max(layer.error for layer in last):.2g}")
    groups = "1 group" if report.groups == 1 else f"{report.groups} groups"
    lines.append(f"{len(report.layers)} results, in {groups} and {format_duration(report.seconds)}")
    return lines


def _more(layers: Sequence[Layer], what: str) -> list[str]:
    rest = len(layers) - _NAMED
    return [f"and {rest} more {what}"] if rest > 0 else []


def table_lines(report: GraphReport, rows: int) -> list[str]:
    """Return the layers that matter most as a table, in graph order.

    Args:
        report: of one graph.
        rows: that there may be, without the head: what is beyond a bound first, then the largest own errors.
    """
    chosen = sorted(report.layers, key=lambda layer: _interest(report, layer))[:rows]
    cells = [_COLUMNS, *(_cells(layer) for layer in sorted(chosen, key=lambda layer: layer.index))]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_COLUMNS))]
    return ["  ".join(_aligned(row, widths)).rstrip() for row in cells]


def _interest(report: GraphReport, layer: Layer) -> tuple[bool, bool, bool, float]:
    firsts = (report.first_divergence, report.first_not_finite)
    own = layer.own if layer.own == layer.own else float("inf")
    return not layer.breaks, not layer.is_off, layer not in firsts, -own


def _cells(layer: Layer) -> tuple[str, ...]:
    return (
        layer.label,
        layer.operator,
        layer.type,
        f"{layer.reference.largest:.3g}",
        f"{layer.examined.largest:.3g}",
        f"{layer.error:.1e}",
        f"{layer.own:.1e}",
        remarks(layer),
    )


def remarks(layer: Layer) -> str:
    """Return what a person should notice of a layer."""
    found = []
    if layer.breaks:
        found.append("breaks")
    elif layer.is_off:
        found.append("off by itself")
    if not layer.examined.is_finite:
        found.append(counts(layer.examined))
    if layer.exceeds_fp16:
        found.append("beyond fp16")
    if layer.type == "fp16" and layer.reference.small > _MUCH:
        found.append(f"{layer.reference.small:.0%} below fp16's normal values")
    return ", ".join(found)


#: Share of values that lose digits in fp16 from which on it is told.
_MUCH = 0.1


def counts(spread: Spread) -> str:
    """Return how many values of a tensor are not finite, in words."""
    parts = [
        f"{count} {one if count == 1 else many}"
        for count, one, many in ((spread.nans, "NaN", "NaNs"), (spread.infinities, "infinity", "infinities"))
        if count
    ]
    return " and ".join(parts)


def holds(kind: str) -> str:
    """Return what a type holds, in words."""
    return f"{kind} holds {RANGES[kind][0]:.5g}" if kind in RANGES else kind


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    numbers = range(3, 7)
    return [
        cell.rjust(width) if column in numbers else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
