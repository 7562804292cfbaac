"""A server that learns from the feedback that it gets: a thread reads it from the log, in order, and replaces the head."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sqlalchemy.exc import SQLAlchemyError

from p2l_engine.decision_log.log import DecisionLog
from p2l_engine.engine import Engine
from p2l_engine.learning.hidden import hidden_states
from p2l_engine.learning.learned import LearnedHead
from p2l_engine.learning.learner import Learner
from p2l_engine.learning.rows import NewModel
from p2l_engine.learning.write import last_feedback, retired_models
from p2l_engine.serve.added_models import added
from p2l_engine.serve.learn_state import LearnState
from p2l_engine.serve.learning_engine import LearningEngine
from p2l_engine.serve.lessons import Lesson
from p2l_engine.serve.next_lessons import is_log_of, next_lessons, reference_prompts, states_of
from p2l_engine.serve.prompt_states import PromptStates
from p2l_engine.serve.refinement import Refinement, lower_priority
from p2l_engine.serve.settings import ConfigError, Learn
from p2l_engine.serve.vote_updates import updated

Float32 = npt.NDArray[np.float32]

REFERENCE = 256  # prompts that say how prompts vary, before anything is learned
NEWEST = 1024  # of them, where more are known
LONGEST = 30.0  # seconds that the end of the server waits for the thread
FAILED = "its update failed"

logger = logging.getLogger(__name__)


class OnlineLearning:
    """settings: of the configuration. engine: of the checkpoint, whose head is where learning starts. days: how long hidden
    states of prompts are kept.

    Reads the state in ``settings.state``, or begins one; ``open`` starts the thread, ``close`` ends it. What was learned and
    how far the feedback was read are saved together, so that feedback counts once, whatever ends the process. Raises
    ConfigError for a state of another checkpoint, one that cannot be used, and names that cannot be given to new models.

    learned: votes; skipped: feedback that gave none, by reason; waiting and oldest: feedback not learned from yet, and since
    when (seconds since 1970); seconds: that updates took; ready: whether enough is known of how prompts vary.
    """

    def __init__(self, settings: Learn, engine: Engine, days: float | None = None) -> None:
        self.settings, self._days = settings, days
        if engine.theta_map is not None:
            raise ConfigError(
                f"serve.learn: {engine.folder} is calibrated by a monotone map (calibration.json), behind which rows cannot be "
                "learned: calibrate with linear maps alone (--map)"
            )
        cpu, uncertainty = torch.device("cpu"), engine.uncertainty
        certain = None if uncertainty is None else uncertainty.to(cpu)
        self._checkpoint = LearnedHead(engine.head.to(cpu), certain, engine.models, engine.feedback)
        self._retired = retired_models(engine.folder)
        self._state = LearnState(settings, engine)
        self.learned = self.updates = self._failed = self.waiting = 0
        self.seconds = self.last_seconds = 0.0
        self.oldest: float | None = None
        self.skipped = Counter[str]()
        self._number, self._decision = last_feedback(engine.folder)  # of the last one that was read
        self._reference = 0  # prompts that say how prompts vary
        self._learner = self._begun(engine)
        self._lengths = engine.lengths is not None
        self.engine = LearningEngine(engine, self._head(), self._remember)
        self._joining, self._publishing, self._wake = threading.Lock(), threading.Lock(), threading.Event()
        self._join(self.additions(settings))
        self._states: PromptStates | None = None
        self.refinement = Refinement(self._refined)
        self._saved, self._changed = time.monotonic(), False
        self._closing = self._failing = False

    @property
    def failures(self) -> int:
        """Updates, refinements and savings that failed."""
        return self._failed + self.refinement.failures

    @property
    def refinements(self) -> int:
        """How often the optimum over all votes was found."""
        return self.refinement.count

    @property
    def pending(self) -> int:
        """Votes since the optimum over all of them was found last."""
        return self._learner.pending

    @property
    def ready(self) -> bool:
        """Whether it is known how prompts vary."""
        return self._reference >= REFERENCE or self.settings.prompts is not None

    @property
    def lag(self) -> float:
        """Seconds since the oldest feedback that was not learned from; 0 where there is none."""
        return 0.0 if self.oldest is None else max(0.0, time.time() - self.oldest)

    def additions(self, settings: Learn) -> list[NewModel]:
        """The models of a configuration that are not learned yet. Raises ConfigError."""
        return added(settings, self._learner, self._checkpoint.models, self._retired)

    def adopt(self, settings: Learn) -> None:
        """Takes a new configuration: models that it adds join the head, before their first vote. Raises ConfigError."""
        with self._joining:
            self._join(self.additions(settings))
            self.settings, self._changed = settings, True

    def lines(self) -> list[str]:
        """What a user should know, for ``serve --check``."""
        joined = self._learner.models[len(self._checkpoint.models) :]
        found = [
            f"learns from feedback: {self._learner.votes:,} votes so far" + (f"; new: {', '.join(joined)}" if joined else "")
        ]
        if self._lengths:
            found.append("while it learns, the checkpoint's expected lengths of answers are not used: each model's mean is")
        if not self.ready:
            found.append(
                f"learning begins once {REFERENCE} different prompts were asked, which say how yours vary; serve.learn.prompts "
                "names a file of them"
            )
        return found

    def open(self, log: DecisionLog) -> None:
        """Makes the state's folder if there is none, and starts. Raises ConfigError where it cannot be written, or where
        another process learns there."""
        self._states = self._state.open(self.settings.prompts_kept, self._days)
        try:
            self._save()
        except OSError as error:
            raise ConfigError(f"{self._state.where}: cannot be written: {error}") from None
        self._log = log
        if (last := log.last_number()) < self._number or not is_log_of(log, self._number, self._decision):
            logger.warning("serve.learn: the log is not the one of before: all feedback in it is new")
            self._number, self._decision, self._changed = 0, None, True
        self.waiting, self.oldest = log.waiting(self._number)
        self._thread = threading.Thread(target=self._run, name="learning", daemon=True)
        self._thread.start()
        logger.info("learning continues after feedback %d of %d", self._number, last)

    def close(self) -> None:
        """Learns from what was given, saves, and ends."""
        self._closing = True
        self._wake.set()
        self._thread.join(LONGEST)
        if self._thread.is_alive():
            logger.error("the server ends before all feedback was learned from: it is, when the server starts again")
        elif self._states is not None:
            self._states.close()
            self._state.close()

    def _begun(self, engine: Engine) -> Learner:
        """The learner of the saved state, or a new one."""
        found = self._state.read(self._checkpoint)
        if found is not None:
            notes = found.notes
            self._number, self._reference, self.learned = (int(notes[name]) for name in ("number", "reference", "learned"))
            self._decision = notes.get("decision")
            self.skipped.update(notes["skipped"])
            return found
        reference = np.zeros((0, self._checkpoint.head.weight.shape[1]), np.float32)
        if self.settings.prompts is not None:
            reference = hidden_states(engine, reference_prompts(self.settings.prompts))
        return self._new_learner(reference)

    def _new_learner(self, reference: Float32) -> Learner:
        loaded = self._checkpoint
        self._reference = len(reference)
        return Learner(loaded.head, loaded.models, loaded.feedback, reference, uncertainty=loaded.uncertainty)

    def _head(self) -> LearnedHead:
        head, uncertainty = self._learner.head()
        return LearnedHead(head, uncertainty, self._learner.models, self._checkpoint.feedback)

    def _remember(self, prompt: str, state: Float32) -> None:
        if self._states is not None:
            self._states.add(prompt, state)

    def _run(self) -> None:
        """The thread."""
        lower_priority()
        while True:
            self._wake.wait(self.settings.seconds)
            closing = self._closing
            try:
                self._step()
                self._failing = False
            except SQLAlchemyError as error:
                if not self._failing:
                    logger.error("learning waits: the store fails (%s)", type(error).__name__)
                self._failing = True
            except Exception:  # whatever it is, the thread continues, and reads the feedback again
                self._failed += 1
                logger.exception("learning failed")
            if closing:
                self._save_or_log()
                return

    def _step(self) -> None:
        """Everything that is due."""
        assert self._states is not None
        self._states.flush()
        self.waiting, self.oldest = self._log.waiting(self._number)
        if not self.ready and self._states.count >= REFERENCE:
            self._begin(np.stack(self._states.newest(NEWEST)))
        while self.ready and self.waiting:
            last, found, skipped = next_lessons(
                self._log, self._number, self._states, self._learner.models, self._checkpoint.feedback
            )
            if last is None:
                break
            self._learn(found, skipped)
            self.skipped += skipped
            self._number, self._decision, self._changed = last.number, last.feedback.decision, True
            self.waiting, self.oldest = self._log.waiting(self._number)
            self._save_if_due()
        if not self._closing:
            self.refinement.begin_if_due(self._learner, self.settings.refine)
        self._save_if_due()

    def flush(self) -> None:
        """Writes the hidden states that are in memory: feedback on these prompts can be learned from after a
        restart. Raises SQLAlchemyError."""
        if self._states is not None:
            self._states.flush()

    def _begin(self, reference: Float32) -> None:
        """Starts anew, now that it is known how prompts vary: nothing was learned before."""
        with self._joining:
            joined = self._learner.models[len(self._checkpoint.models) :]
            self._learner = self._new_learner(reference)
            described = {new.name: new for new in self.additions(self.settings)}
            self._join([described.get(name, NewModel(name)) for name in joined])  # in their order, which requests rely on
            self._publish()
            self._changed = True

    def _join(self, new: list[NewModel]) -> None:
        if new:
            self._learner.join(new)
            self._publish()

    def _learn(self, found: list[Lesson], skipped: Counter[str]) -> None:
        """Updates by these votes, and adds those that cannot be learned from to ``skipped``."""
        assert self._states is not None
        states = states_of(found, self._states, self.engine.engine, skipped)
        usable = [lesson for lesson in found if lesson.prompt in states]
        if not usable:
            return
        began = time.perf_counter()
        learned = updated(self._learner, usable, states)
        self.learned += learned
        if failed := len(usable) - learned:
            self._failed += failed
            skipped[FAILED] += failed
        self._publish()
        self.updates += 1
        self.last_seconds = time.perf_counter() - began
        self.seconds += self.last_seconds

    def _refined(self) -> None:
        self._publish()
        self._changed = True

    def _publish(self) -> None:
        """Requests that begin now get the head as it is now."""
        with self._publishing:
            self.engine.current = self._head()

    def _save_if_due(self) -> None:
        if self._changed and time.monotonic() > self._saved + self.settings.save_seconds:
            self._save_or_log()

    def _save_or_log(self) -> None:
        try:
            if self._changed:
                self._save()
        except OSError as error:
            self._failed += 1
            logger.error("what was learned is not saved: %s", error)
        self._saved = time.monotonic()

    def _save(self) -> None:
        self._changed, saved = False, False  # before: an update meanwhile is to be saved too
        last = {"number": self._number, "decision": self._decision}
        notes: dict[str, Any] = {**last, "reference": self._reference, "learned": self.learned}
        try:
            self._state.save(self._learner, {**notes, "skipped": dict(self.skipped)})
            saved = True
        finally:
            self._changed = self._changed or not saved
