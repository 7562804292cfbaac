"""Expected outcomes of every pair of models, summed over prompts; sums over disjoint prompts can be added.

The right-hand side of the paper's (3): the cross-entropy is linear in the outcome, so that a leaderboard over prompts needs
only the mean of their outcome probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2l_engine.arguments import whole_number
from p2l_engine.bootstrap import WeightSums, poisson
from p2l_engine.coefficients import Coefficients
from p2l_engine.feedback import FeedbackModel
from p2l_engine.native import routing as native
from p2l_engine.routing import arrays

Float64 = npt.NDArray[np.float64]

CHUNK = 1 << 19  # pairs (of all prompts) computed at once: they stay in the cache
CHUNKS = 8  # chunks in each product with the bootstrap weights, whose sums do not fit the cache
WIDEST = 300.0  # beyond it exp(theta) could overflow: probabilities are then computed in log space


def pair_count(n_models: int) -> int:
    """M (M - 1) / 2."""
    return n_models * (n_models - 1) // 2


def pairs(n_models: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """a and b [M (M - 1) / 2] of every pair a < b, in the order of all arrays of pairs."""
    a, b = np.triu_indices(n_models, 1)
    return a.astype(np.int64), b.astype(np.int64)


@dataclass(slots=True)
class OutcomeSums:
    """Sums over prompts of the probabilities of each outcome, for every pair of models.

    sums [1 + B, K, M (M - 1) / 2] float64: for all prompts, then for B bootstrap samples of them; K outcomes in the feedback
    model's order (A, B, tie, both bad; A is the first model of the pair). weight [1 + B]: the sum of the prompts' weights;
    weights: what intervals have to know of them.
    Adding two gives the sums over both sets of prompts; give each another ``stream``, so that their bootstrap samples are
    independent.
    """

    feedback: FeedbackModel
    models: tuple[str, ...]
    bootstrap: int = 0
    seed: int = 0
    stream: int = 0
    sums: Float64 = field(init=False)
    weight: Float64 = field(init=False)
    weights: WeightSums = field(init=False, default=WeightSums())
    prompts: int = field(init=False, default=0)
    _streams: frozenset[int] = field(init=False)
    _rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        if self.feedback.of_values:
            raise ValueError(f"feedback: expected a model of votes, got {self.feedback.name!r}")
        whole_number("bootstrap", self.bootstrap, 0)
        whole_number("seed", self.seed, 0)
        if len(self.models) < 2:
            raise ValueError(f"models: expected at least two, which votes can compare, got {list(self.models)}")
        self.sums = np.zeros((1 + self.bootstrap, len(self.feedback.outcomes), pair_count(len(self.models))))
        self.weight = np.zeros(1 + self.bootstrap)
        self._streams = frozenset([self.stream])
        self._rng = np.random.default_rng([self.seed, self.stream])

    def add(self, coefficients: Coefficients, weights: npt.ArrayLike | None = None) -> None:
        """Adds the prompts of these coefficients. weights [N] >= 0 (None: 1). Raises ValueError for other models or another
        feedback model, and for weights or coefficients that are not finite."""
        if coefficients.models != self.models or coefficients.feedback.name != self.feedback.name:
            raise ValueError(
                f"coefficients: expected {self.feedback.name} over {list(self.models)}, got {coefficients.feedback.name} over "
                f"{list(coefficients.models)}"
            )
        n, m = coefficients.theta.shape
        each = np.ones(n) if weights is None else arrays.to_float64("weights", weights)
        if each.shape != (n,) or not (np.isfinite(each).all() and (each >= 0).all()):
            raise ValueError(f"weights: expected {n} finite numbers >= 0, got shape {list(each.shape)}")
        if not np.isfinite(coefficients.theta).all():
            raise ValueError("coefficients: expected finite theta")
        step = max(1, CHUNK // max(1, pair_count(m)))
        self.weight[0] += each.sum()
        self.weights += WeightSums.of(each)
        for first in range(0, n, CHUNKS * step):
            parts = []
            for start in range(first, min(n, first + CHUNKS * step), step):
                some = slice(start, min(start + step, first + CHUNKS * step))
                theta = torch.from_numpy(coefficients.theta[some]).double()
                eta = None if coefficients.eta is None else torch.from_numpy(coefficients.eta[some]).double()
                of_pairs = probabilities(self.feedback, theta, eta).flatten(1)
                self.sums[0] += (torch.from_numpy(each[some]) @ of_pairs).view(self.sums.shape[1:]).numpy()
                if self.bootstrap:  # float32's rounding is far below the spread of the samples
                    parts.append(of_pairs.float())
            if parts:
                self._resample(torch.cat(parts), each[first : first + CHUNKS * step])
        self.prompts += n

    def _resample(self, of_pairs: Tensor, weights: Float64) -> None:
        """Adds prompts to each bootstrap sample, Poisson(1) times each."""
        share = poisson(len(weights), self.bootstrap, self._rng) * weights
        self.weight[1:] += share.sum(1)
        scale = float(weights.max()) or 1.0  # weights may be beyond float32
        found = (torch.from_numpy(share / scale).float() @ of_pairs).double() * scale
        self.sums[1:] += found.view(self.bootstrap, *self.sums.shape[1:]).numpy()

    def __add__(self, other: OutcomeSums) -> OutcomeSums:
        same = (self.models, self.feedback.name, self.bootstrap) == (other.models, other.feedback.name, other.bootstrap)
        if not same:
            raise ValueError("other: expected sums of the same models, feedback model and number of bootstrap samples")
        if self.bootstrap and self._streams & other._streams:
            raise ValueError(
                f"stream: expected another than {sorted(self._streams)}, so that bootstrap samples are independent"
            )
        both = OutcomeSums(self.feedback, self.models, self.bootstrap, self.seed, self.stream)
        both.sums, both.weight = self.sums + other.sums, self.weight + other.weight
        # Later additions must not repeat the random numbers of either.
        both._rng = np.random.default_rng([self.seed, self.stream, other.stream, self.prompts + other.prompts])
        both.weights = self.weights + other.weights
        both.prompts, both._streams = self.prompts + other.prompts, self._streams | other._streams
        return both

    @property
    def means(self) -> Float64:
        """[1 + B, K, M (M - 1) / 2]: the mean probabilities, without bootstrap samples that hold no prompt, as may happen with
        few prompts. Raises ValueError where no prompt has a weight."""
        if not self.weight[0] > 0:
            raise ValueError("weights: expected some prompts of a weight above 0")
        some = self.weight > 0
        return self.sums[some] / self.weight[some, None, None]


def probabilities(feedback: FeedbackModel, theta: Tensor, eta: Tensor | None) -> Tensor:
    """theta [N, M], eta [N] float64 -> [N, K, M (M - 1) / 2]: ``FeedbackModel.probabilities`` of every pair, with M
    exponentials a prompt instead of several a pair, and a relative error of about 1e-10 at most."""
    a, b = (torch.from_numpy(index) for index in pairs(theta.shape[1]))
    known = len(feedback.outcomes)
    wide_range = float(theta.abs().max()) > WIDEST or (eta is not None and float(eta.abs().max()) > WIDEST)
    if wide_range or not feedback.rao_kupper:
        wide = None if eta is None else eta[:, None]
        return feedback.probabilities(theta[:, a], theta[:, b], wide)[..., :known].movedim(-1, 1)
    e = theta.exp().contiguous().numpy()
    used = eta if feedback.has_eta else None  # a bt head may have a tie parameter that nothing uses
    handicap = None if used is None else feedback.log_lambda(used).exp().contiguous().numpy()
    return torch.from_numpy(native.outcomes(e, handicap, feedback.grounded, known, torch.get_num_threads()))
