"""The functions that exponential integrators are made of.

A solver that is exact in a linear part meets integrals of `exp` times powers; they are all phi functions.
Source: Hochbruck and Ostermann 2010, "Exponential integrators", section 2.
"""

import math

_TAYLOR_TERMS = 24  # enough for double precision where |z| < 1


def phi(k: int, z: float) -> float:
    """`phi_0(z) = exp(z)` and `phi_k(z) = (phi_{k-1}(z) - 1 / (k-1)!) / z`; 1 / k! at 0. Accurate for small z, too."""
    if abs(z) < 1:
        return sum(z**n / math.factorial(n + k) for n in range(_TAYLOR_TERMS))
    value = math.exp(z)
    for j in range(k):
        value = (value - 1 / math.factorial(j)) / z
    return value
