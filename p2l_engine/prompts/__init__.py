"""What did the user say (parse), and which token ids is that (encode)."""

from p2l_engine.prompts.parse import Prompt, user_turns

__all__ = ["Prompt", "user_turns"]
