"""A server process that learns and is killed: what it learned in the end is what adapt finds from all votes."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

import numpy as np
import pytest
import torch

from bench.load import servers
from p2l_engine import checkpoint
from p2l_engine.engine import Engine
from p2l_engine.feedback import Outcome
from p2l_engine.learning.adapt import adapt
from p2l_engine.learning.hidden import hidden_states
from p2l_engine.learning.learner import Learner
from p2l_engine.learning.rows import NewModel
from p2l_engine.votes import Votes
from tests.support import tiny

NEW, LIVES, VOTES = "zeta", 3, 12
REFERENCE = [f"reference {i}" for i in range(20)]


def post(port: int, path: str, body: Any) -> tuple[str, Any]:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.headers.get("x-p2l-decision", ""), json.load(answer)


def status(port: int) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/status", timeout=60) as answer:
        return json.load(answer)["learning"]


def until(port: int, so: Any) -> Any:
    for _ in range(1200):
        if so(found := status(port)):
            return found
        time.sleep(0.05)
    raise AssertionError(f"it did not happen: {found}")


@pytest.mark.slow
def test_a_killed_server_learns_on_and_its_end_is_the_optimum_of_all_votes(tmp_path):
    folder = tiny.write(tmp_path / "checkpoint")
    engine = Engine(checkpoint.load(folder), "cpu", "float32")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in REFERENCE))
    learn = {
        "state": str(tmp_path / "state"), "prompts": str(tmp_path / "prompts.jsonl"), "models": {NEW: None}, "seconds": 0.05,
        "refine": 1, "save_seconds": 0.4,
    }  # fmt: skip
    models, given, moved = (*tiny.MODELS, NEW), list[tuple[str, str, str, Outcome]](), list[Any]()
    with servers.provider(tmp_path, models, tokens_out=3) as mock:
        # The prompt of a named model may not be computed yet when the server is killed: it is, later, from its text.
        config = servers.config(
            mock.port, models, store=str(tmp_path / "serve.sqlite"), explore="thompson", learn=learn, log_prompts=True
        )
        for life in range(LIVES):
            with servers.ours("learns", tmp_path, config, str(folder), ("--dtype", "float32", "--device", "cpu")) as subject:
                port = subject.port
                before = until(port, lambda found: not found["waiting"])
                assert before["learned"] == life * VOTES  # nothing is lost, and nothing counts twice
                for i in range(VOTES):
                    prompt, other = f"question {(life * VOTES + i) % 20}", tiny.MODELS[i % 5]
                    body = {"max_tokens": 20, "messages": [{"role": "user", "content": prompt}]}
                    ids = [post(port, "/v1/chat/completions", body | {"model": name})[0] for name in (NEW, other)]
                    post(port, "/v1/feedback", {"id": ids[0], "against": ids[1], "preference": "this"})
                    given.append((prompt, NEW, other, Outcome.A))
                if life < LIVES - 1:
                    time.sleep(0.3 * life)  # before anything was saved, and later
                    subject.processes[0].kill()
                else:
                    until(port, lambda found: found["learned"] == LIVES * VOTES and not found["pending"])
                    decided = [post(port, "/v1/route", body | {"p2l": {"session": str(i)}})[1]["model"] for i in range(20)]
                    moved = [name == NEW for name in decided]
    assert np.mean(moved) > 0.5  # the new model always won
    learner = Learner.load(tmp_path / "state" / "learner.safetensors", engine.head, engine.feedback)
    assert (learner.votes, learner.pending) == (len(given), 0)
    prompts = list(dict.fromkeys(prompt for prompt, *_ in given))
    columns = [np.array([models.index(vote[i]) for vote in given]) for i in (1, 2)]
    prompt, outcome = (np.array(of) for of in zip(*((prompts.index(p), o) for p, _, _, o in given), strict=True))
    votes = Votes.make([(p,) for p in prompts], models, prompt, *columns, outcome)
    hidden, reference = hidden_states(engine, prompts), hidden_states(engine, REFERENCE)
    best = adapt(
        engine.head, engine.models, engine.feedback, votes, hidden, [NewModel(NEW)], reference=reference, scales=learner.scales
    )
    found = [
        (torch.from_numpy(hidden) @ head.weight.T + head.bias)[:, : len(models)].detach().numpy()
        for head in (learner.head()[0], best.head)
    ]
    np.testing.assert_allclose(*found, atol=1e-4)
