"""The feedback models: what coefficients mean (paper, 2.1 and 2.2).

``models`` lists them and what each one knows, without torch; ``formulas`` has their probabilities and loads with the first use.
A new model is an entry in the one and a function in the other.
"""

from p2l_engine.feedback.models import NAMES, FeedbackModel, feedback_model
from p2l_engine.feedback.outcome import Outcome

__all__ = ["NAMES", "FeedbackModel", "Outcome", "feedback_model"]
