"""Prompts: parsed into user turns (parse), written as text by a chat template (template), and tokenised (tokenizer, encode)."""

from p2l_engine.prompts.parse import Prompt, Turns, user_turns

__all__ = ["Prompt", "Turns", "user_turns"]
