"""The rates of a report as bars, as long as their logarithms: an SVG of a few lines, drawn by hand."""

from html import escape
from math import log10
from typing import Final

from benchmarks.report import Report, Result

_ROW: Final = 22
_LABELS: Final = 430
_BARS: Final = 430
_MARGIN: Final = 12
_COLOURS: Final = (("floor", "#8a8f98"), ("glue", "#d08770"), ("", "#3b7dd8"))


def drawn(report: Report) -> str:
    """Draw all results that are changes a second: median as a bar, least and greatest round as a line."""
    rates = [one for one in report.results if one.unit == "changes/s" and one.value > 0]
    height = _ROW * (len(rates) + 2) + 2 * _MARGIN
    width = _LABELS + _BARS + 130 + 2 * _MARGIN
    top = log10(max((one.spread[1] for one in rates), default=10.0))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="{_MARGIN + 12}" font-weight="bold">changes a second (logarithmic)</text>',
    ]
    for number, one in enumerate(rates, start=1):
        lines += _bar(one, _MARGIN + number * _ROW, top)
    lines.append(
        f'<text x="{_MARGIN}" y="{height - _MARGIN}" fill="#666666">{escape(report.machine)}:'
        f" {escape(report.command)}</text>"
    )
    return "\n".join([*lines, "</svg>", ""])


def _bar(one: Result, y: int, top: float) -> list[str]:
    def at(value: float) -> float:
        return round(_BARS * max(0.0, log10(max(value, 1.0))) / top, 1)

    start, middle = _LABELS + _MARGIN, y + _ROW // 2
    colour = next(colour for word, colour in _COLOURS if word in one.case)
    least, greatest = start + at(one.spread[0]), start + at(one.spread[1])
    return [
        f'<text x="{start - 8}" y="{middle + 4}" text-anchor="end">{escape(one.case)}</text>',
        f'<rect x="{start}" y="{y + 4}" width="{at(one.value)}" height="{_ROW - 8}" fill="{colour}"/>',
        f'<line x1="{least}" x2="{greatest}" y1="{middle}" y2="{middle}" stroke="#222222"/>',
        f'<text x="{greatest + 6}" y="{middle + 4}">{one.value:,.0f}</text>',
    ]
