"""Files of prompts to files of decisions: millions of rows, in bounded memory, that survive being killed."""

from p2l_engine.batch.config import Asked
from p2l_engine.batch.report import Report
from p2l_engine.batch.run import run
from p2l_engine.batch.worker import Route

__all__ = ["Asked", "Report", "Route", "run"]
