"""Requests as agents and chat interfaces write them, with short texts of our own in place of theirs.

The fields, headers, kinds of messages and tools are those that Claude Code 2.1.197 and Codex CLI 0.171.0 sent to a mock
provider, and that the sources of Open WebUI (routers/openai.py) and LibreChat (endpoints of librechat.yaml) write.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """One conversation of a client. path: with its query. headers: of every request. steps: the bodies of its requests, in
    order, none of which adds a turn of the user's. turns: what the user said."""

    path: str
    headers: dict[str, str]
    steps: list[Json]
    turns: list[str] = field(default_factory=lambda: ["What is in a.txt?"])


SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"], "additionalProperties": False}
CACHED = {"cache_control": {"type": "ephemeral"}}
REMINDER = "<system-reminder>\nHere is some context:\n# currentDate\nToday's date is 2026-11-26.\n</system-reminder>\n\n"
SESSION = "4537248a-740a-4a6d-a90d-9d4918058b42"
THREAD = "01a217a4-c8c3-7a71-8af5-f2e0d03fca9b"


def _text(text: str, **more: Any) -> Json:
    return {"type": "text", "text": text, **more}


def claude_code() -> Shape:
    """Two rounds of a tool, with thinking between them; reminders beside results and in messages of their own."""
    body: Json = {
        "model": "auto",
        "system": [
            _text("x-agent-header: version=2; entrypoint=cli;"),
            _text("You are an agent.", **CACHED),
            _text("Be brief."),
        ],
        "tools": [
            {"name": "Read", "description": "Reads a file.", "input_schema": SCHEMA},
            {"name": "Bash", "description": "Runs a command.", "input_schema": SCHEMA, **CACHED},
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        ],
        "metadata": {"user_id": f'{{"device_id":"3122","account_uuid":"","session_id":"{SESSION}"}}'},
        "max_tokens": 32000,
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
    }
    first = [
        {"role": "user", "content": [_text(REMINDER), _text("What is in a.txt?", **CACHED)]},
        {"role": "system", "content": "Available skills: none."},
    ]
    call = {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"path": "a.txt"}}
    second = [
        {"role": "user", "content": [_text(REMINDER), _text("What is in a.txt?")]},
        first[1],
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "A file.", "signature": "EqQB"}, call]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "denied", "is_error": True},
            _text("<system-reminder>\nThe file is empty.\n</system-reminder>", **CACHED),
        ]},
    ]  # fmt: skip
    more = {"type": "redacted_thinking", "data": "EmwK"}
    third = [
        *second,
        {"role": "assistant", "content": [more, {**call, "id": "toolu_2", "name": "Bash", **CACHED}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_2", "content": [_text("hello")], **CACHED},
        ]},
    ]  # fmt: skip
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
        "x-app": "cli",
        "x-claude-code-session-id": SESSION,
        "user-agent": "claude-cli/2.1.197 (external, cli)",
        "x-stainless-lang": "js",
    }
    steps = [{**body, "messages": messages} for messages in (first, second, third)]
    return Shape("/v1/messages?beta=true", headers, steps)


def claude_code_before_its_header() -> Shape:
    """Of 2025: the session is named in the metadata alone, after the user."""
    shape = claude_code()
    headers = {name: value for name, value in shape.headers.items() if name != "x-claude-code-session-id"}
    user = {"user_id": f"user_3122_account__session_{SESSION}"}
    drop = ("thinking", "context_management", "output_config")
    steps = [{k: v for k, v in {**body, "metadata": user}.items() if k not in drop} for body in shape.steps]
    return Shape(shape.path, headers, steps)


def claude_code_title() -> Shape:
    """The small request that names a conversation: no tools, but the list of them, and a schema."""
    schema = {
        "type": "object",
        "properties": {"title": {"type": "string"}},
        "required": ["title"],
        "additionalProperties": False,
    }
    body: Json = {
        "model": "auto",
        "messages": [{"role": "user", "content": [_text("What is in a.txt?")]}],
        "system": [_text("Write a title.")],
        "tools": [],
        "metadata": {"user_id": f'{{"session_id":"{SESSION}"}}'},
        "max_tokens": 32000,
        "temperature": 1,
        "output_config": {"format": {"type": "json_schema", "schema": schema}},
        "stream": True,
    }
    return Shape("/v1/messages?beta=true", {"x-claude-code-session-id": SESSION, "anthropic-version": "2023-06-01"}, [body])


def codex_cli() -> Shape:
    """Instructions in developer messages, the house rules and the environment as the user's; calls of three kinds of tools."""

    def message(role: str, *texts: str) -> Json:
        parts = [{"type": "input_text", "text": text} for text in texts]
        return {"type": "message", "id": f"msg_{len(texts[0])}", "role": role, "content": parts}

    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
    body: Json = {
        "model": "auto",
        "instructions": "You are a coding agent.",
        "tools": [
            {"type": "function", "name": "exec_command", "description": "Runs it.", "strict": False, "parameters": SCHEMA},
            {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": grammar},
            {"type": "local_shell"},
            {"type": "web_search", "external_web_access": False},
            {"type": "namespace", "name": "agents", "description": "Helpers.", "tools": [
                {"type": "function", "name": "spawn", "description": "Starts one.", "strict": False, "parameters": SCHEMA},
            ]},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "text": {"verbosity": "low"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": THREAD,
        "client_metadata": {"session_id": THREAD, "thread_id": THREAD, "x-codex-installation-id": "8a01548f"},
    }  # fmt: skip
    first = [
        message("developer", "You are a coding agent.", "<permissions instructions>\nAsk first.\n</permissions instructions>"),
        message(
            "user",
            "# AGENTS.md instructions for /work\n\n<INSTRUCTIONS>\nUse tabs.\n</INSTRUCTIONS>",
            "<environment_context>\n  <cwd>/work</cwd>\n  <shell>bash</shell>\n</environment_context>",
        ),
        message("user", "What is in a.txt?"),
    ]
    second = [
        *first,
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "gAAAAABo"},
        {"type": "function_call", "id": "fc_1", "name": "exec_command", "arguments": '{"path": "a.txt"}', "call_id": "call_1"},
        {"type": "function_call_output", "id": "fco_1", "call_id": "call_1", "output": "hello\n"},
    ]
    action = {"type": "exec", "command": ["cat", "a.txt"], "env": {}, "timeout_ms": 1000}
    third = [
        *second,
        {"type": "custom_tool_call", "status": "completed", "call_id": "call_2", "name": "apply_patch", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "call_2", "output": "Done"},
        {"type": "local_shell_call", "call_id": "call_3", "status": "completed", "action": action},
        {"type": "local_shell_call_output", "call_id": "call_3", "output": "hello\n"},
        {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "hello"}]},
    ]
    headers = {
        "accept": "text/event-stream",
        "originator": "codex_exec",
        "session-id": THREAD,
        "thread-id": THREAD,
        "x-client-request-id": THREAD,
        "x-codex-turn-metadata": f'{{"session_id":"{THREAD}","turn_id":"01a217a4"}}',
        "user-agent": "codex_exec/0.171.0",
    }
    return Shape("/v1/responses", headers, [{**body, "input": given} for given in (first, second, third)])


def open_webui() -> Shape:
    """Through its own server, with ENABLE_FORWARD_USER_INFO_HEADERS; a tool is called between the steps."""
    tools = [{"type": "function", "function": {"name": "read", "description": "Reads.", "parameters": SCHEMA}}]
    body: Json = {
        "model": "auto",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.7,
        "tools": tools,
    }
    first = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "text", "text": "What is in a.txt?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
        ]},
    ]  # fmt: skip
    call = {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a.txt"}'}, "index": 0}
    second = [
        *first,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "hello"},
    ]
    headers = {
        "x-openwebui-user-name": "Ada%20Lovelace",
        "x-openwebui-user-id": "8a01548f",
        "x-openwebui-user-email": "ada@example.com",
        "x-openwebui-user-role": "user",
        "x-openwebui-chat-id": SESSION,
    }
    return Shape(
        "/v1/chat/completions",
        headers,
        [{**body, "messages": found} for found in (first, second)],
        ["What is in a.txt?\n[image]"],
    )


def open_webui_direct() -> Shape:
    """From the browser: the interface's own fields come with the request."""
    body: Json = {
        "model": "auto",
        "messages": [{"role": "user", "content": "What is in a.txt?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "params": {},
        "tool_servers": [],
        "features": {"image_generation": False, "code_interpreter": False, "web_search": False, "memory": False},
        "variables": {"{{USER_NAME}}": "Ada", "{{CURRENT_DATE}}": "2026-11-26"},
        "background_tasks": {"title_generation": True, "tags_generation": True, "follow_up_generation": True},
        "session_id": "a-tab-of-the-browser",
        "chat_id": SESSION,
        "id": "message-2",
    }
    later = {**body, "session_id": "another-tab", "id": "message-4"}
    return Shape("/v1/chat/completions", {"origin": "http://localhost:3000"}, [body, later])


def librechat() -> Shape:
    """A custom endpoint with x-conversation-id among its headers; the client is OpenAI's for Node."""
    body: Json = {
        "model": "auto",
        "temperature": 1,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "user": "665f1c2e9b1d8a0012345678",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is in a.txt?"}],
    }
    headers = {"x-conversation-id": SESSION, "user-agent": "OpenAI/JS 5.12.2", "x-stainless-lang": "js"}
    return Shape("/v1/chat/completions", headers, [body])


SHAPES = (
    claude_code, claude_code_before_its_header, claude_code_title, codex_cli, open_webui, open_webui_direct, librechat,
)  # fmt: skip
