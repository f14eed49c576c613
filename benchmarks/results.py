"""One measurement as a row, and all rows as a table or as JSON."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Result:
    """One row.

    Attributes:
        what: What was measured.
        unit: Of the three values.
        floor: What the bare tools need; None where there is no such thing.
        ours: What the provider needs.
        other: What one call for each node and loops of 5 s need (`standin`); None where that says nothing.
        target: What is wanted, for people.
        met: Whether it was; None where nothing is wanted.
    """

    what: str
    unit: str
    floor: float | None
    ours: float
    other: float | None = None
    target: str = ""
    met: bool | None = None

    @property
    def ratio(self) -> float | None:
        """Ours to the floor."""
        return self.ours / self.floor if self.floor else None


def within(what: str, unit: str, floor: float, ours: float, *, times: float, other: float | None = None) -> Result:
    """Return a result that may be so many times the floor."""
    return Result(what, unit, floor, ours, other, f"<= {times:g} x floor", ours <= times * floor)


def above(what: str, unit: str, floor: float, ours: float, *, extra: float, other: float | None = None) -> Result:
    """Return a result that may be so much above the floor."""
    return Result(what, unit, floor, ours, other, f"<= floor + {extra:g} {unit}", ours <= floor + extra)


def at_most(what: str, unit: str, ours: float, *, most: float, other: float | None = None) -> Result:
    """Return a result that may be so much."""
    return Result(what, unit, None, ours, other, f"<= {most:g} {unit}", ours <= most)


def median_of(times: int, measure: Callable[[], float]) -> float:
    """Return the median of several measurements."""
    return statistics.median(measure() for _ in range(times))


def table(results: list[Result]) -> Table:
    """Return the rows for people."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("what", "unit", "floor", "ours", "ratio", "other", "target", ""):
        shown.add_column(column, justify="right" if column in {"floor", "ours", "ratio", "other"} else "left")
    for row in results:
        verdict = {True: "met", False: "MISSED", None: ""}[row.met]
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        shown.add_row(
            row.what, row.unit, _number(row.floor), _number(row.ours), ratio, _number(row.other), row.target, verdict
        )
    return shown


def as_json(results: list[Result]) -> list[dict[str, object]]:
    """Return the rows for programs."""
    return [{**asdict(row), "ratio": row.ratio} for row in results]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
