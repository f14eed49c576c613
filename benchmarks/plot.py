"""The results and the phases of a start as pictures (SVG), without a library for that."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.results import Result

_FLOOR, _OURS, _OTHER = "#9aa5b1", "#0b7285", "#e8590c"
_COLOURS = ("#0b7285", "#9aa5b1", "#74b816", "#e8590c", "#845ef7", "#f59f00", "#495057")
_LEFT, _WIDTH, _BAR = 330, 900, 9
_TEXT = 'font-family="sans-serif" font-size="12" fill="#212529"'


def ratios(results: Sequence[Result]) -> str:
    """Return a picture of what we and others need, as multiples of what the bare tools need; each gridline is ten."""
    rows = [row for row in results if row.floor and row.ours > 0]
    largest = max((row.other or row.ours) / row.floor for row in rows if row.floor)
    decades = max(1, math.ceil(math.log10(max(largest, 2))))
    height = 70 + len(rows) * 36
    scale = (_WIDTH - _LEFT - 60) / (decades + 1)

    def x(ratio: float) -> float:
        # A decade below the floor, and as many above as it takes.
        return _LEFT + (max(math.log10(ratio), -1) + 1) * scale

    parts = [_open(height)]
    for power in range(-1, decades + 1):
        at = x(10.0**power)
        parts.append(f'<line x1="{at:.1f}" y1="30" x2="{at:.1f}" y2="{height - 30}" stroke="#dee2e6"/>')
        parts.append(f'<text x="{at:.1f}" y="22" text-anchor="middle" {_TEXT}>{10.0**power:g} x</text>')
    for number, row in enumerate(rows):
        top = 40 + number * 36
        parts.append(f'<text x="{_LEFT - 8}" y="{top + 18}" text-anchor="end" {_TEXT}>{escape(row.what)}</text>')
        bars = [(1.0, _FLOOR), (row.ours / (row.floor or 1), _OURS)]
        bars += [(row.other / (row.floor or 1), _OTHER)] if row.other else []
        for line, (ratio, colour) in enumerate(bars):
            wide = max(x(ratio) - _LEFT, 1)
            y = top + line * (_BAR + 1)
            parts.append(f'<rect x="{_LEFT}" y="{y}" width="{wide:.1f}" height="{_BAR}" fill="{colour}"/>')
    legend = (("bare tools", _FLOOR), ("ray-slurm-provider", _OURS), ("a call for each node, 5 s loops", _OTHER))
    for number, (name, colour) in enumerate(legend):
        at = _LEFT + number * 180
        parts.append(f'<rect x="{at}" y="{height - 20}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{at + 18}" y="{height - 10}" {_TEXT}>{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def phases(seconds: Mapping[str, float]) -> str:
    """Return a picture of where the time from the demand to the first task goes."""
    total = sum(seconds.values())
    scale = (_WIDTH - 40) / total
    height = 90 + 18 * len(seconds)
    parts = [_open(height), f'<text x="20" y="20" {_TEXT}>from demand to the first task: {total:.2f} s</text>']
    at = 20.0
    for number, (name, lasts) in enumerate(seconds.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        parts.append(f'<rect x="{at:.1f}" y="30" width="{lasts * scale:.1f}" height="28" fill="{colour}"/>')
        y = 80 + 18 * number
        parts.append(f'<rect x="20" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="40" y="{y}" {_TEXT}>{lasts:.2f} s  {escape(name)}</text>')
        at += lasts * scale
    return "\n".join([*parts, "</svg>", ""])


def _open(height: int) -> str:
    size = f'width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<rect width="100%" height="100%" fill="white"/>'
