"""Linear systems of graphs, solved without cancellation: weights of 1e-130 beside weights of 1 keep all their digits.

A loss of differences of coefficients has the Laplacian of a graph as its Hessian: a node for each model, an edge for each pair.
Eliminating a node joins its neighbours by edges of weight w_ik w_jk / sum of w_k (the star-mesh transform), which are sums of
positive numbers; Cholesky's method subtracts from the diagonal and loses there what saturated pairs know. The right-hand side
may be given as flows along the edges, which cancel at the optimum only where they meet.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

SINGULAR = 1e-12  # of a pivot, relative to what it is the sum of


class Star(NamedTuple):
    """What eliminating a node leaves: the sum of its weights, and the later nodes' shares of it. A pivot of 0: the node has no
    edge left and stays where it is."""

    pivot: float
    shares: Float64


class IndefiniteError(ArithmeticError):
    """The quadratic form has no minimum."""


def eliminate(weights: Float64, semidefinite: bool = False) -> list[Star]:
    """weights [n, n], symmetric, of the edges -> the stars of the first n - 1 nodes, eliminated in their order; the last node
    is fixed at 0. semidefinite: that a negative pivot can only be rounding; otherwise it raises IndefiniteError."""
    left, stars = weights.copy(), []
    for k in range(len(weights) - 1):
        row = left[k, k + 1 :].copy()
        pivot, size = float(row.sum()), float(np.abs(row).sum())
        if pivot < -SINGULAR * size and not semidefinite:
            raise IndefiniteError("the quadratic form has no minimum")
        if pivot <= SINGULAR * size:
            stars.append(Star(0.0, np.zeros(len(row))))
            continue
        shares = row / pivot
        left[k + 1 :, k + 1 :] += np.outer(shares, row)
        stars.append(Star(pivot, shares))
    return stars


def solve_flows(stars: list[Star], flows: Float64) -> Float64:
    """x [n] with Laplacian x = the sums over j of flows [n, n] (i to j, antisymmetric); the last entry is 0."""
    left, n = flows.copy(), len(flows)
    x, sums = np.zeros(n), np.zeros(n)
    for k, (_, shares) in enumerate(stars):
        row = left[k, k + 1 :].copy()
        sums[k] = row.sum()
        left[k + 1 :, k + 1 :] += np.outer(shares, row) - np.outer(row, shares)
    return _back(stars, x, sums)


def solve_nodes(stars: list[Star], sums: Float64) -> Float64:
    """x [n, B] with Laplacian x = sums [n, B] of each node; the last row is 0."""
    left = sums.copy()
    for k, (_, shares) in enumerate(stars):
        left[k + 1 :] += shares[:, None] * left[k]
    return _back(stars, np.zeros_like(left), left)


def _back(stars: list[Star], x: Float64, sums: Float64) -> Float64:
    for k in range(len(stars) - 1, -1, -1):
        pivot, shares = stars[k]
        if pivot > 0:
            x[k] = shares @ x[k + 1 :] + sums[k] / pivot
    return x
