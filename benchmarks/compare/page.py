"""The comparison as a page for any browser: charts along the graph, and every layer; nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from benchmarks.compare.findings import RANGES, GraphReport, Layer
from benchmarks.compare.table import remarks, verdict_lines
from engine.bundle.storage import APP_NAME, atomic_write
from engine.cli.report_page import page_style

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 1000, 220, 52, 20
_HEADS = ("#", "layer", "operator", "type", "shape", "max |x|", "examined", "error", "own", "")
_NUMBERS = ("#", "max |x|", "examined", "error", "own")


def write_page(path: Path, reports: Sequence[GraphReport], titles: tuple[str, str], facts: Mapping[str, str]) -> None:
    """Write the page, whole or not at all.

    Args:
        path: of the page.
        reports: one for each graph.
        titles: what the reference and the examined way are called.
        facts: what was compared, by name.
    Raises:
        OutputError: it cannot be written.
    """
    template = Template((files("benchmarks.compare") / "page.html").read_text("utf-8"))
    page = template.substitute(
        title=escape(f"{titles[1]} against {titles[0]}"),
        generator=APP_NAME,
        style=page_style(),
        facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()),
        graphs="\n".join(map(_graph, reports)),
    )
    with atomic_write(path, "write the page") as file:
        file.write(page.encode("utf-8", "replace"))


def _graph(report: GraphReport) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in verdict_lines(report))
    heads = "".join(f"<th{' class=n' if head in _NUMBERS else ''}>{escape(head)}</th>" for head in _HEADS)
    rows = "".join(map(_row, report.layers))
    bad = "" if report.agrees else " bad"
    return (
        f"<article><h2>{escape(report.graph)}, {escape(report.stage)}</h2><ul class='verdict{bad}'>{lines}</ul>"
        f"{_errors_chart(report)}{_range_chart(report)}"
        f"<div class='wide'><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></article>"
    )


def _row(layer: Layer) -> str:
    place = f"<small>{escape(layer.place)}</small>" if layer.place else ""
    numbers = (layer.reference.largest, layer.examined.largest, layer.error, layer.own)
    cells = "".join(f"<td class='n'>{number:.2g}</td>" for number in numbers)
    shape = " × ".join(map(str, layer.shape))
    found = " class='found'" if _is_found(layer) else ""
    return (
        f"<tr{found}><td class='n'>{layer.index}</td><td>{escape(layer.name)}{place}</td><td>{escape(layer.operator)}"
        f"</td><td>{layer.type}</td><td>{shape}</td>{cells}<td>{escape(remarks(layer))}</td></tr>"
    )


def _is_found(layer: Layer) -> bool:
    return layer.breaks or layer.is_off or layer.diverges or not layer.examined.is_finite


# -- charts -----------------------------------------------------------------------------------------


def _errors_chart(report: GraphReport) -> str:
    """Draw both errors of every layer, on a logarithmic scale."""
    x, y = _scales(report, 1e-9, 10.0)
    marks = [f"<path class='error' d='{_path(report, x, y, lambda layer: layer.error)}'/>"]
    for layer in report.layers:
        if layer.own > 0:
            marks.append(f"<circle class='own' r='1.6' cx='{x(layer):.1f}' cy='{y(layer.own):.1f}'/>")
    marks += _flags(report, x)
    bounds = {layer.bound for layer in report.layers} | {layer.own_bound for layer in report.layers}
    marks += [_line(y(bound), f"{bound:g}", "bound") for bound in sorted(bounds) if bound > 0]
    key = "<b class='error'>line: error</b>, <b class='own'>dots: own</b>, dashed: bounds"
    return _chart("Errors along the graph", key, marks, [(10.0**power, y) for power in range(-8, 1, 2)])


def _range_chart(report: GraphReport) -> str:
    """Draw the largest value of every layer against what fp16 holds."""
    x, y = _scales(report, 1e-6, 1e8)
    marks = [
        f"<path class='error' d='{_path(report, x, y, lambda layer: layer.examined.largest)}'/>",
        *(
            f"<circle class='own' r='1.6' cx='{x(layer):.1f}' cy='{y(layer.reference.largest):.1f}'/>"
            for layer in report.layers
            if layer.reference.largest > 0
        ),
        *_flags(report, x),
    ]
    largest, smallest = RANGES["fp16"]
    marks += [_line(y(largest), f"fp16 {largest:.0f}", "bound"), _line(y(smallest), f"fp16 {smallest:.1g}", "bound")]
    key = "<b class='own'>dots: the reference</b>, <b class='error'>line: examined</b>, dashed: what fp16 holds"
    return _chart("Largest value along the graph", key, marks, [(10.0**power, y) for power in range(-4, 9, 4)])


def _scales(report: GraphReport, low: float, high: float) -> tuple[Callable[[Layer], float], Callable[[float], float]]:
    last = max((layer.index for layer in report.layers), default=0) or 1
    span = math.log10(high) - math.log10(low)

    def x(layer: Layer) -> float:
        return _LEFT + (_WIDTH - _LEFT - 4) * layer.index / last

    def y(value: float) -> float:
        inside = min(max(value, low), high) if value == value else high  # NaN and infinity lie at the top
        return 4 + (_HEIGHT - _BOTTOM - 4) * (math.log10(high) - math.log10(inside)) / span

    return x, y


def _path(
    report: GraphReport, x: Callable[[Layer], float], y: Callable[[float], float], value: Callable[[Layer], float]
) -> str:
    return "M" + "L".join(f"{x(layer):.1f} {y(value(layer)):.1f}" for layer in report.layers)


def _flags(report: GraphReport, x: Callable[[Layer], float]) -> Iterable[str]:
    """Draw an upright line, with its name, where a layer is off by itself."""
    for layer in report.off:
        title = escape(f"{layer.label}: {remarks(layer)}")
        yield (
            f"<line class='bad' x1='{x(layer):.1f}' x2='{x(layer):.1f}' y1='4' y2='{_HEIGHT - _BOTTOM}'>"
            f"<title>{title}</title></line>"
        )


def _line(height: float, label: str, kind: str) -> str:
    return (
        f"<line class='{kind}' x1='{_LEFT}' x2='{_WIDTH}' y1='{height:.1f}' y2='{height:.1f}'/>"
        f"<text x='{_LEFT + 4}' y='{height - 3:.1f}'>{escape(label)}</text>"
    )


def _chart(title: str, key: str, marks: Iterable[str], ticks: Iterable[tuple[float, Callable[[float], float]]]) -> str:
    grid = "".join(
        f"<line class='grid' x1='{_LEFT}' x2='{_WIDTH}' y1='{y(value):.1f}' y2='{y(value):.1f}'/>"
        f"<text x='{_LEFT - 4}' y='{y(value) + 4:.1f}' text-anchor='end'>{value:.0e}</text>"
        for value, y in ticks
    )
    return (
        f"<p class='key'>{escape(title)}: {key}</p>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{escape(title)}'>{grid}{''.join(marks)}</svg>"
    )
