"""Ways to say how far a prompt is from those of training, by hidden states: what ``bench.away`` compares."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import logsumexp
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

from p2l_engine.backbone.head import Head
from p2l_engine.learning.rows import INFORMATION
from p2l_engine.learning.shrinkage import of_training

Float64 = npt.NDArray[np.float64]
Names = npt.NDArray[np.str_]
Distance = Callable[[Float64], Float64]  # of hidden states [N, D], [N]
Fit = Callable[[Float64, Names, Head], Distance]  # to training prompts: their hidden states [T, D], their tasks [T], a head

CENTROIDS, COMPONENTS, RANK = 64, 16, 48


def kinds(training: Float64, task: Names, head: Head) -> Distance:
    """To the nearest of the training prompts' tasks, less that to all of them: what a checkpoint stores."""
    found, _ = of_training(head, np.zeros(head.width), training.astype(np.float32), training.shape[1], task.tolist())
    return lambda states: found.distance(torch.from_numpy(states.astype(np.float32))).double().numpy()


def clusters(training: Float64, task: Names, head: Head) -> Distance:
    """The same to the nearest of k clusters: what a checkpoint stores where tasks are not known."""
    return kinds(training, np.full(len(task), ""), head)


def mahalanobis(training: Float64, _: Names, __: Head) -> Distance:
    """Mahalanobis's, for a covariance of low rank and a diagonal (probabilistic PCA of standardised states)."""
    standard = _standardised(training)
    z = standard(training)
    variances, directions = np.linalg.eigh(z.T @ z / len(z))
    rank = max(1, min(RANK, z.shape[1] - 1, len(z) // 2))
    rest = max(float(variances[:-rank].mean()), 1e-6)
    main, along = directions[:, -rank:], np.maximum(variances[-rank:], rest)

    def distance(states: Float64) -> Float64:
        of = standard(states)
        p = of @ main
        across = np.maximum(np.square(of).sum(1) - np.square(p).sum(1), 0) / rest
        return np.asarray(np.sqrt((np.square(p) / along).sum(1) + across), np.float64)

    return distance


def centroids(training: Float64, _: Names, __: Head) -> Distance:
    """To the nearest of the centroids, in standardised states."""
    standard = _standardised(training)
    means = KMeans(CENTROIDS, n_init=2, random_state=0).fit(standard(training))
    return lambda states: np.asarray(means.transform(standard(states)).min(1), np.float64)


def laplace(training: Float64, _: Names, head: Head) -> Distance:
    """The standard deviation of theta under Laplace's posterior of a row of the head: each prompt has a vote on the model
    against each other one, and rows are normal, as widely spread as the head's."""
    rows = head.weight[: head.n_models].double().numpy()
    x = np.concatenate([training, np.ones((len(training), 1))], 1)
    votes = INFORMATION * (head.n_models - 1)
    precision = votes * x.T @ x + np.eye(x.shape[1]) / np.square(rows).mean()
    half = np.linalg.inv(np.linalg.cholesky(precision))
    return lambda states: np.linalg.norm(states @ half[:, :-1].T + half[:, -1], axis=1)


def density(training: Float64, _: Names, __: Head) -> Distance:
    """The root of minus twice the logarithm of a density, but for a constant: a mixture of normal distributions of one
    covariance along the widest directions, and a normal distribution across them."""
    standard = _standardised(training)
    z = standard(training)
    directions = np.linalg.svd(z, full_matrices=False)[2][: min(RANK, len(z) // 4)].T
    main = z @ directions
    rest = np.sqrt(max(float((np.square(z).sum() - np.square(main).sum()) / (z.size - main.size)), 1e-12))
    mixture = GaussianMixture(COMPONENTS, covariance_type="tied", reg_covar=1e-3, random_state=0).fit(main)

    def distance(states: Float64) -> Float64:
        of = standard(states)
        inside = of @ directions
        around = np.maximum(np.square(of).sum(1) - np.square(inside).sum(1), 0) / rest**2
        apart = (inside[:, None] - mixture.means_) @ mixture.precisions_cholesky_
        within = -2 * logsumexp(np.log(mixture.weights_) - np.square(apart).sum(2) / 2, axis=1)
        return np.asarray(np.sqrt(np.maximum(within, 0) + around), np.float64)

    return distance


DISTANCES: dict[str, Fit] = {
    "kinds": kinds, "clusters": clusters, "mahalanobis": mahalanobis, "centroids": centroids, "laplace": laplace,
    "density": density,
}  # fmt: skip


def _standardised(training: Float64) -> Callable[[Float64], Float64]:
    mean, spread = training.mean(0), training.std(0)
    return lambda states: np.asarray((states - mean) / np.maximum(spread, 1e-9), np.float64)
