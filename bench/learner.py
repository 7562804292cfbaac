"""A stream of votes through learning.Learner, beside the optimum of all of them: python -m bench.learner.

    python -m bench.learner --csv bench/results/learner.csv

Simulated: hidden states [D] whose variance falls as 1 / k along their k-th direction, nine known models whose rows are in the
checkpoint, and a new one; the truth of each row is a draw from the learner's own prior. Each vote is on a prompt of its own
and two random models, a third of them on the new one, under grk. An update takes --batch votes. Rate and CPU seconds are those
of the updates, the vote's hidden state being there; memory is that of the votes, which are kept: what they add to the saved
state. Apart: the root mean square
difference of theta between the updates alone and the maximum over all votes (``refine``), over 1,000 other prompts, in theta
and in posterior deviations, of the known models and of the new one.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.setting import positive, run, write_rows
from p2l_engine.backbone.head import Head
from p2l_engine.feedback import feedback_model
from p2l_engine.learning.learner import Learner
from p2l_engine.learning.prior import of_rows
from p2l_engine.learning.rows import HeadRows, NewModel
from p2l_engine.votes import Votes

Float64 = npt.NDArray[np.float64]

KNOWN = 9
MODELS = (*(f"model-{i}" for i in range(KNOWN)), "new")
FEEDBACK = feedback_model("grk")
MEASURED_ON = 1_000  # prompts
KNOWN_VOTES = 2_000  # that the checkpoint's rows count for


@dataclass(frozen=True)
class Row:
    """After so many votes. per_second: votes; cpu: seconds in all; longest: milliseconds of an update; megabytes: of the votes.
    known, new: how far apart theta is of the known models and of the new one; known_sd, new_sd: in posterior deviations.
    refine: CPU seconds of the refinement."""

    votes: int
    per_second: float
    cpu: float
    longest: float
    megabytes: float
    known: float
    known_sd: float
    new: float
    new_sd: float
    refine: float


class World:
    """The hidden states, the checkpoint's head, and the truth."""

    def __init__(self, dimensions: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.spread = 1 / np.sqrt(np.arange(1, dimensions + 1))
        weights = self.rng.normal(size=(KNOWN + 1, dimensions)) / np.sqrt(dimensions) / self.spread / 3
        weights[-1] = 0.0  # eta
        self.head = Head(torch.from_numpy(weights).float(), torch.zeros(KNOWN + 1), KNOWN)

    def hidden(self, count: int) -> npt.NDArray[np.float32]:
        """[count, D]"""
        return (self.rng.normal(size=(count, len(self.spread))) * self.spread).astype(np.float32)

    def votes(self, truth: Head, hidden: npt.NDArray[np.float32]) -> Votes:
        """One for each prompt."""
        n, rng = len(hidden), self.rng
        theta = hidden.astype(np.float64) @ truth.weight.double().numpy().T + truth.bias.double().numpy()
        a = np.where(rng.random(n) < 1 / 3, KNOWN, rng.integers(0, KNOWN, n))
        b = (a + rng.integers(1, KNOWN + 1, n)) % (KNOWN + 1)
        every = np.arange(n)
        pair = torch.from_numpy(theta[every, a]), torch.from_numpy(theta[every, b]), torch.from_numpy(theta[:, -1])
        p = FEEDBACK.probabilities(*pair).numpy()
        outcome = np.minimum((rng.random(n)[:, None] > p.cumsum(1)).sum(1), 3)
        return Votes.make([(str(i),) for i in range(n)], MODELS, every, a, b, outcome)


def truth_of(head: Head, reference: npt.NDArray[np.float32], rng: np.random.Generator) -> Head:
    """A draw of all rows from a learner's prior."""
    rows = HeadRows.of(head, MODELS[:-1], [NewModel(MODELS[-1])], reference, known_votes=KNOWN_VOTES)
    scales = of_rows(rows.basis)
    factors = [rows.known_factor(i, scales) for i in range(KNOWN)] + [rows.new_factors(scales)[KNOWN]]
    drawn = rows.means + np.stack([rows.basis.matrix @ (factor @ rng.normal(size=len(factor))) for factor in factors])
    return rows.head(head, drawn, range(KNOWN))


def saved(learner: Learner) -> float:
    """Megabytes of its state."""
    with TemporaryDirectory() as folder:
        learner.save(Path(folder) / "state")
        return (Path(folder) / "state").stat().st_size / 2**20


def measured(votes: int, batch: int, dimensions: int, seed: int) -> Row:
    """One stream."""
    world = World(dimensions, seed)
    reference = world.hidden(2_000)
    learner = Learner(world.head, MODELS[:-1], FEEDBACK, reference, [NewModel(MODELS[-1])], known_votes=KNOWN_VOTES)
    truth, empty = truth_of(world.head, reference, world.rng), saved(learner)
    seconds, cpu, longest = 0.0, 0.0, 0.0
    for start in track(range(0, votes, batch), "updates"):
        hidden = world.hidden(min(batch, votes - start))
        given = world.votes(truth, hidden)
        wall, own = time.perf_counter(), time.process_time()
        learner.update(given, hidden)
        took = time.perf_counter() - wall
        seconds, cpu, longest = seconds + took, cpu + time.process_time() - own, max(longest, took)
    kept = saved(learner) - empty
    others = torch.from_numpy(world.hidden(MEASURED_ON))
    updated = _theta(learner.head()[0], others)
    own = time.process_time()
    learner.refine()
    refine = time.process_time() - own
    head, uncertainty = learner.head()
    assert uncertainty is not None
    away, deviation = updated - _theta(head, others), uncertainty.deviation(others).double().numpy()
    apart = [float(np.sqrt((part**2).mean())) for x in (away, away / deviation) for part in (x[:, :KNOWN], x[:, KNOWN:])]
    return Row(votes, votes / seconds, cpu, 1000 * longest, kept, apart[0], apart[2], apart[1], apart[3], refine)


def _theta(head: Head, hidden: torch.Tensor) -> Float64:
    out = hidden.double() @ head.weight.double().T + head.bias.double()
    return head.split(out)[0].numpy()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=positive, nargs="+", default=[1_000, 10_000, 100_000], help="lengths of the streams")
    parser.add_argument("--batch", type=positive, default=50, help="votes of an update")
    parser.add_argument("--dimensions", type=positive, default=576, help="of hidden states")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    rows = [measured(n, arguments.batch, arguments.dimensions, arguments.seed) for n in arguments.votes]
    table = Table(box=None)
    for name in ("votes", "votes/s", "CPU s", "longest", "MB", "known", "in sd", "new", "in sd", "refine"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.votes:,}", f"{row.per_second:,.0f}", f"{row.cpu:.1f}", f"{row.longest:.0f} ms", f"{row.megabytes:.0f}",
            f"{row.known:.4f}", f"{row.known_sd:.3f}", f"{row.new:.4f}", f"{row.new_sd:.3f}", f"{row.refine:.1f} s",
        )  # fmt: skip
    Console().print(table)
    if arguments.csv is not None:
        write_rows(arguments.csv, rows, torch.device("cpu"))


if __name__ == "__main__":
    run(main)
