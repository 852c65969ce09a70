"""The integrals that multistep and exponential samplers are made of."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.sampling.exponential import phi
from octavo.sampling.quadrature import integrate, interpolation_weights, lagrange


@given(z=st.floats(-20, 5), k=st.integers(1, 4))
def test_phi_is_the_integral_it_stands_for(z: float, k: int) -> None:
    """phi_k(z) = integral over [0, 1] of exp((1 - s) z) s**(k-1) / (k-1)!"""
    expected = integrate(lambda s: math.exp((1 - s) * z) * s ** (k - 1) / math.factorial(k - 1), 0.0, 1.0)
    assert phi(k, z) == pytest.approx(expected, rel=1e-9)


def test_phi_at_0_is_one_over_a_factorial() -> None:
    assert [phi(k, 0.0) for k in range(5)] == [1, 1, 1 / 2, 1 / 6, 1 / 24]


@pytest.mark.parametrize("degree", range(20))
def test_polynomials_are_integrated_exactly(degree: int) -> None:
    expected = (2.0 ** (degree + 1) - (-1.0) ** (degree + 1)) / (degree + 1)
    assert integrate(lambda s: s**degree, -1.0, 2.0) == pytest.approx(expected, rel=1e-12)


def test_lagrange_polynomials_are_one_at_their_point_and_zero_at_the_others() -> None:
    points = [0.9, 0.5, 0.2]
    assert [[lagrange(points, j, at) for at in points] for j in range(3)] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_weights_for_equal_steps_are_those_of_adams_and_bashforth() -> None:
    assert interpolation_weights([0.0, -1.0], 0.0, 1.0) == pytest.approx([3 / 2, -1 / 2])
    assert interpolation_weights([0.0, -1.0, -2.0], 0.0, 1.0) == pytest.approx([23 / 12, -16 / 12, 5 / 12])
    fourth = [55 / 24, -59 / 24, 37 / 24, -9 / 24]
    assert interpolation_weights([0.0, -1.0, -2.0, -3.0], 0.0, 1.0) == pytest.approx(fourth)


def test_a_density_weighs_the_interpolated_function() -> None:
    """A line is interpolated without error, so its weighted integral is exact."""
    weights = interpolation_weights([0.0, -1.0], 0.0, 1.0, density=math.exp)
    assert weights[0] * 3.0 + weights[1] * 1.0 == pytest.approx(integrate(lambda s: math.exp(s) * (3 + 2 * s), 0, 1))
