"""Models that a configuration adds to those that a server learns."""

from __future__ import annotations

from collections.abc import Sequence

from p2l_engine.learning.learner import Learner
from p2l_engine.learning.names import check_new
from p2l_engine.learning.new_models import Described, Descriptions
from p2l_engine.learning.rows import NewModel
from p2l_engine.serve.settings import ConfigError, Learn


def added(settings: Learn, learner: Learner, known: Sequence[str], retired: Sequence[str]) -> list[NewModel]:
    """The models of ``settings`` that the learner does not have yet. known: the checkpoint's, which come first in the learner;
    retired: names that may not be given again. Raises ConfigError."""
    described = {name: Described(name, model.like, model.prior_rating) for name, model in settings.models.items()}
    joined = learner.models[len(known) :]
    try:
        check_new([name for name in described if name not in joined], learner.models, retired)
        all_new = Descriptions(tuple(described.values()), settings.ratings).as_new_models(known, learner.mean_theta)
    except ValueError as error:
        raise ConfigError(f"serve.learn.models: {error}") from None
    return [model for model in all_new if model.name not in joined]
