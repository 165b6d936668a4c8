"""Which points no other point beats in everything at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

_Point = TypeVar("_Point")


def front(
    points: Iterable[_Point], objectives: Callable[[_Point], Sequence[float]]
) -> list[_Point]:
    """The Pareto front: points that no other dominates, ordered by their first objective.

    Parameters
    ----------
    points : iterable
    objectives : function
        Numbers of a point, all of them better when smaller.  A point with a NaN is left out.

    Notes
    -----
    p dominates q if p <= q in every objective and p < q in one.  Of equal points the first stays.
    """
    numbered = [(tuple(objectives(point)), point) for point in points]
    known = [(values, point) for values, point in numbered if all(v == v for v in values)]
    kept: list[tuple[tuple[float, ...], _Point]] = []
    # In ascending order a point can be dominated only by one before it.
    for values, point in sorted(known, key=lambda pair: pair[0]):
        if not any(all(a <= b for a, b in zip(other, values, strict=True)) for other, _ in kept):
            kept.append((values, point))
    return [point for _, point in kept]
