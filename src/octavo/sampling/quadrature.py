"""Integrals of interpolating polynomials, which multistep samplers are made of.

An Adams method replaces an unknown function by the polynomial through its last values and integrates that; the
integral is a weighted sum of those values. The weights depend on the sigmas only and are computed here, in double
precision, by Gauss-Legendre quadrature.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch

NODES = 24


@cache
def _gauss_legendre() -> list[tuple[float, float]]:
    """Nodes in [-1, 1] with their weights, from the Jacobi matrix of the Legendre polynomials.

    Source: Golub and Welsch 1969, "Calculation of Gauss quadrature rules".
    """
    k = torch.arange(1, NODES, dtype=torch.float64)
    off_diagonal = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return list(zip(nodes.tolist(), (2 * vectors[0] ** 2).tolist(), strict=True))


def integrate(function: Callable[[float], float], start: float, end: float) -> float:
    """The integral of a smooth function."""
    half, middle = (end - start) / 2, (end + start) / 2
    return half * sum(weight * function(middle + half * node) for node, weight in _gauss_legendre())


def lagrange(points: Sequence[float], j: int, at: float) -> float:
    """The polynomial that is 1 at `points[j]` and 0 at every other point, evaluated."""
    value = 1.0
    for k, point in enumerate(points):
        if k != j:
            value *= (at - point) / (points[j] - point)
    return value


def interpolation_weights(
    points: Sequence[float],
    start: float,
    end: float,
    *,
    density: Callable[[float], float] = lambda _: 1.0,
    coordinate: Callable[[float], float] = lambda s: s,
) -> list[float]:
    """Weights `w` so that `sum(w[j] * f(points[j]))` integrates `density` times an interpolation of f.

    Args:
        points: where f is known, all different.
        start, end: bounds of the integral; `end` may be the smaller.
        density: a smooth factor.
        coordinate: the interpolating polynomial is one in `coordinate(s)`.
    """
    places = [coordinate(point) for point in points]

    def weight(j: int) -> float:
        return integrate(lambda s: density(s) * lagrange(places, j, coordinate(s)), start, end)

    return [weight(j) for j in range(len(points))]
