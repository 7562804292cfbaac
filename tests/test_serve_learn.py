"""A server that learns from feedback: what becomes a vote, new models, reloads, restarts, and what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch
import yaml

from bench.load.servers import config as config_of
from p2l_engine import checkpoint
from p2l_engine.decision_log.store import LogStore, Selection
from p2l_engine.engine import Engine
from p2l_engine.engine.batcher import Batcher
from p2l_engine.feedback import Outcome
from p2l_engine.learning.adapt import adapt
from p2l_engine.learning.hidden import hidden_states
from p2l_engine.learning.learner import Learner
from p2l_engine.learning.rows import NewModel
from p2l_engine.serve import learn as module
from p2l_engine.serve import lessons, next_lessons, settings
from p2l_engine.serve.runtime import Runtime
from p2l_engine.serve.settings import ConfigError
from p2l_engine.votes import Votes
from tests.support import tiny
from tests.support.cases import slow_but
from tests.support.command import p2l_engine
from tests.support.serving import Serving, serving

NEW = "zeta"
REFERENCE = [f"reference {i} {'abc'[i % 3] * i}" for i in range(20)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    return Engine(checkpoint.load(tiny.write(tmp_path_factory.mktemp("tiny") / "checkpoint")), "cpu", "float32")


def config_in(folder: Any, models: Any = (NEW,), more: Any = (), **learn: Any) -> dict[str, Any]:
    """The tiny checkpoint's models and new ones. models: that are learned; more: settings of the server."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in REFERENCE), encoding="utf-8")
    own = {"state": str(folder / "state"), "prompts": str(prompts), "seconds": 0.02, "refine": 1, **learn}
    own["models"] = dict(models if isinstance(models, dict) else dict.fromkeys(models))
    found = config_of(1, [*tiny.MODELS, NEW, "eta"], store=str(folder / "serve.sqlite"), learn=own, **dict(more))
    return found


class Client:
    """Asks a server for decisions of one model each, and says what is thought of them."""

    def __init__(self, server: Serving, http: aiohttp.ClientSession) -> None:
        self.server, self.http = server, http

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with self.http.post(self.server.url + path, json=body) as response:
            return response.status, await response.json()

    async def decision(self, prompt: str, model: str | None = None) -> dict[str, Any]:
        own = {} if model is None else {"models": [model]}
        status, found = await self.post("/v1/route", {"messages": [{"role": "user", "content": prompt}], "p2l": own})
        assert status == 200, found
        return dict(found)

    async def prefer(self, prompt: str, a: str, b: str, preference: str = "this") -> tuple[str, str]:
        first, second = await self.decision(prompt, a), await self.decision(prompt, b)
        body = {"id": first["id"], "against": second["id"], "preference": preference}
        assert (await self.post("/v1/feedback", body))[0] == 200
        return first["id"], second["id"]

    async def status(self) -> dict[str, Any]:
        async with self.http.get(f"{self.server.url}/v1/status") as response:
            return dict((await response.json())["learning"])

    async def until(self, so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        for _ in range(1500):
            if so(found := await self.status()):
                return found
            await asyncio.sleep(0.02)
        raise AssertionError(f"it did not happen: {found}")

    async def learned(self, votes: int) -> dict[str, Any]:
        return await self.until(lambda found: found["learned"] >= votes and not found["waiting"])


def run(config: dict[str, Any], engine: Engine, work: Any, **options: Any) -> Any:
    """``work`` of a client, with a server."""

    async def one() -> Any:
        async with serving(config, engine, **options) as server, aiohttp.ClientSession() as http:
            return await work(Client(server, http))

    return asyncio.run(one())


def expected(engine: Engine, votes: list[tuple[str, str, str, Outcome]], scales: Any, new: tuple[str, ...] = (NEW,)) -> Any:
    """What ``adapt`` finds from all of them."""
    prompts = list(dict.fromkeys(prompt for prompt, *_ in votes))
    names = (*engine.models, *new)
    columns = [np.array([names.index(vote[i]) for vote in votes]) for i in (1, 2)]
    prompt, outcome = (np.array(of) for of in zip(*((prompts.index(p), o) for p, _, _, o in votes), strict=True))
    given = Votes.make([(p,) for p in prompts], names, prompt, *columns, outcome)
    added = [NewModel(name) for name in new]
    reference = hidden_states(engine, REFERENCE)
    return adapt(
        engine.head,
        engine.models,
        engine.feedback,
        given,
        hidden_states(engine, prompts),
        added,
        reference=reference,
        scales=scales,
    )


def theta(head: Any, hidden: Any) -> Any:
    return (torch.from_numpy(hidden) @ head.weight.T + head.bias)[:, : head.n_models].detach().numpy()


def state_of(folder: Any, engine: Engine) -> Learner:
    return Learner.load(folder / "state" / "learner.safetensors", engine.head, engine.feedback)


@pytest.mark.slow
def test_feedback_moves_the_routing_and_is_what_adapt_finds(engine, tmp_path):
    outcomes = {"this": Outcome.A, "other": Outcome.B, "tie": Outcome.TIE, "both_bad": Outcome.BOTH_BAD}
    given = list[tuple[str, str, str, Outcome]]()

    async def work(client: Client) -> Any:
        best = (await client.decision("question 1"))["model"]
        both = {"messages": [{"role": "user", "content": "question 1"}], "p2l": {"models": [best, NEW]}}
        before = (await client.post("/v1/route", both))[1]["model"]
        for i in range(32):
            other, said = (best, "this") if i % 4 else (tiny.MODELS[i % 5], list(outcomes)[i // 4 % 4])
            await client.prefer(f"question {i % 12}", NEW, other, said)
            given.append((f"question {i % 12}", NEW, other, outcomes[said]))
        status = await client.learned(32)
        await client.until(lambda found: found["refinements"] > 0 and not found["pending"])
        async with client.http.get(f"{client.server.url}/metrics") as response:
            shown = await response.text()
        return (before, best), (await client.post("/v1/route", both))[1]["model"], status, shown

    before, after, status, shown = run(config_in(tmp_path), engine, work)
    assert before[0] == before[1] != NEW == after
    assert (status["failures"], status["skipped"]) == (0, {})
    assert re.search(r"^p2l_learned_votes 32.0$", shown, re.M)
    assert re.search(r'^p2l_feedback_total\{kind="preference",result="stored"\} 32.0$', shown, re.M)
    learner = state_of(tmp_path, engine)
    assert learner.votes == 32
    learner.refine()
    states = hidden_states(engine, [f"question {i}" for i in range(12)])
    adapted = expected(engine, given, learner.scales)
    np.testing.assert_allclose(theta(learner.head()[0], states), theta(adapted.head, states), atol=1e-5)


@pytest.mark.slow
def test_what_gives_no_vote_is_counted(engine, tmp_path):
    async def work(client: Client) -> Any:
        first, second = await client.prefer("a prompt", "alpha", "beta")
        for preference in ("this", "other"):  # a retry, and another opinion
            await client.post("/v1/feedback", {"id": first, "against": second, "preference": preference})
            await client.post("/v1/feedback", {"id": second, "against": first, "preference": preference})  # the other's retry
        await client.post("/v1/feedback", {"id": first, "label": "nice"})
        elsewhere = (await client.decision("another prompt", "gamma"))["id"]
        await client.post("/v1/feedback", {"id": first, "against": elsewhere, "preference": "this"})
        await client.prefer("a prompt", "alpha", "alpha")
        unknown = "dec_" + "0" * 32
        statuses = [(await client.post("/v1/feedback", {"id": unknown, "score": 1}))[0]]
        statuses.append((await client.post("/v1/feedback", {"id": first, "score": 7}))[0])
        for score, model in ((1, "delta"), (0.2, NEW), (0.2, "beta")):
            id = (await client.decision("scored", model))["id"]
            await client.post("/v1/feedback", {"id": id, "score": score})
        status = await client.learned(5)
        async with client.http.get(f"{client.server.url}/metrics") as response:
            return status, statuses, await response.text()

    status, statuses, shown = run(config_in(tmp_path), engine, work)
    assert status["learned"] == 2 + 3  # two opinions; of three scores each pair
    assert status["skipped"] == {
        "the same was said before": 3,
        lessons.LABEL: 1,
        "the two decisions have different prompts": 1,
        "both answers are of the same model": 1,
        lessons.ALONE: 1,
    }
    assert statuses == [404, 400]
    for result in ("unknown", "wrong"):
        assert f'p2l_feedback_total{{kind="score",result="{result}"}} 1.0' in shown
    assert f'p2l_learning_skipped{{reason="{lessons.LABEL}"}} 1.0' in shown


@pytest.mark.slow
def test_a_restart_goes_on_and_learns_from_what_came_meanwhile(engine, tmp_path):
    config = config_in(tmp_path, save_seconds=1000)

    async def first(client: Client) -> None:
        for i in range(6):
            await client.prefer(f"question {i}", NEW, "alpha")
        await client.learned(6)

    run(config, engine, first)
    saved = (tmp_path / "state" / "learner.safetensors").read_bytes()

    async def second(client: Client) -> None:
        for i in range(6, 10):
            await client.prefer(f"question {i}", "alpha", NEW)
        await client.learned(10)

    run(config, engine, second)
    (tmp_path / "state" / "learner.safetensors").write_bytes(saved)  # as if the process had been killed before it saved

    async def third(client: Client) -> dict[str, Any]:
        return await client.learned(10)

    assert run(config, engine, third)["skipped"] == {}
    learner = state_of(tmp_path, engine)
    assert learner.votes == 10
    given = [(f"question {i}", NEW, "alpha", Outcome.A if i < 6 else Outcome.B) for i in range(10)]
    learner.refine()
    states = hidden_states(engine, [prompt for prompt, *_ in given])
    np.testing.assert_allclose(
        theta(learner.head()[0], states), theta(expected(engine, given, learner.scales).head, states), atol=1e-5
    )


@pytest.mark.parametrize("logged", [False, True])
def test_where_hidden_states_are_gone_logged_texts_are_computed_again(logged, engine, tmp_path, monkeypatch):
    config = config_in(tmp_path, more={"log_prompts": logged})

    async def decide(client: Client) -> list[str]:
        return [(await client.decision("a prompt", model))["id"] for model in ("alpha", NEW)]

    monkeypatch.setattr(next_lessons, "PATIENCE", 0.1)
    ids = run(config, engine, decide)
    (tmp_path / "state" / "prompts.sqlite").unlink()

    async def say(client: Client) -> dict[str, Any]:
        body = {"id": ids[0], "against": ids[1], "preference": "this"}
        assert (await client.post("/v1/feedback", body))[0] == 200
        return await client.until(lambda found: found["learned"] + sum(found["skipped"].values()) == 1)

    status = run(config, engine, say)
    assert (status["learned"], status["skipped"]) == ((1, {}) if logged else (0, {next_lessons.NO_STATE: 1}))


@pytest.mark.slow
def test_a_reload_adds_models_and_loses_nothing(engine, tmp_path):
    file = tmp_path / "serve.yaml"
    config = config_in(tmp_path, more={"explore": "thompson"})
    file.write_text(yaml.safe_dump(config), encoding="utf-8")

    async def work(client: Client) -> Any:
        for i in range(5):
            await client.prefer(f"question {i}", NEW, "alpha")
        await client.learned(5)
        changed = config_in(tmp_path, {NEW: None, "eta": {"like": "alpha"}}, {"explore": "thompson"})
        file.write_text(yaml.safe_dump(changed), encoding="utf-8")
        asking = asyncio.gather(*(client.decision(f"question {i % 7}") for i in range(40)))
        assert await client.server.runtime.reload()
        await asking
        await client.prefer("question 1", "eta", "alpha")
        status = await client.learned(6)
        _, coefficients = await client.post("/v1/coefficients", {"prompts": ["a", "question 1"]})
        for wrong, message in (
            ({"alpha": None}, "'alpha' is in the checkpoint"),
            ({NEW: None, "eta": {"like": "missing"}}, "like: expected models of the checkpoint"),
            ({"missing": None}, "expected names under models, got missing"),
        ):
            file.write_text(yaml.safe_dump(config_in(tmp_path, wrong)), encoding="utf-8")
            with pytest.raises(ConfigError, match=re.escape(message)):
                client.server.runtime.planned(settings.load(file))
            assert not await client.server.runtime.reload()
        file.write_text(yaml.safe_dump(config_in(tmp_path, refine=7)), encoding="utf-8")
        assert not await client.server.runtime.reload()  # needs a restart
        return status, coefficients

    status, coefficients = run(config, engine, work, file=file)
    assert status["learned"] == 6
    assert coefficients["models"] == [*tiny.MODELS, NEW, "eta"]
    deviation = np.array(coefficients["deviation"])
    assert deviation.shape == (2, 7)
    assert (deviation[:, [0, 5, 6]] > 0).all()  # those of votes
    assert (deviation[:, 1:5] == 0).all()
    assert (deviation[:, 6] < deviation[:, 5] * 3).all()


@pytest.mark.slow
def test_new_models_are_explored_before_their_first_vote(engine, tmp_path):
    async def work(client: Client) -> Any:
        found = []
        for i in range(60):
            body = {"messages": [{"role": "user", "content": "hello"}], "p2l": {"session": f"s{i}"}}
            found.append((await client.post("/v1/route", body))[1])
        return found

    found = run(config_in(tmp_path, more={"explore": "thompson"}), engine, work)
    assert NEW in {decision["model"] for decision in found}
    assert all(0 < decision["propensity"] <= 1 for decision in found)


@pytest.mark.slow
def test_without_a_file_of_prompts_learning_begins_once_enough_were_asked(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "REFERENCE", 8)

    async def work(client: Client) -> Any:
        await client.prefer("question 0", NEW, "alpha")
        early = await client.until(lambda found: found["waiting"] == 1)
        for i in range(8):
            await client.decision(f"prompt {i}")
        return early, await client.learned(1)

    early, late = run(config_in(tmp_path, prompts=None), engine, work)
    assert (early["ready"], early["learned"]) == (False, 0)
    assert early["lag"] >= 0
    assert late["ready"]
    assert state_of(tmp_path, engine)._rows.basis.matrix.shape[1] > 5


@pytest.mark.slow
def test_a_vote_that_cannot_be_learned_is_counted_and_the_others_are_learned(engine, tmp_path, monkeypatch, caplog):
    update = Learner.update

    def failing(self: Learner, votes: Votes, hidden: Any) -> None:
        if (votes.outcome == Outcome.TIE).any():
            raise ArithmeticError("no minimum")
        update(self, votes, hidden)

    monkeypatch.setattr(Learner, "update", failing)

    async def work(client: Client) -> Any:
        for i, preference in enumerate(("this", "tie", "other")):
            await client.prefer(f"question {i}", NEW, "alpha", preference)
        return await client.learned(2)

    status = run(config_in(tmp_path), engine, work)
    assert (status["learned"], status["failures"], status["skipped"]) == (2, 1, {module.FAILED: 1})
    assert "a vote on zeta and alpha cannot be learned from: no minimum" in caplog.text


@pytest.mark.slow
def test_what_a_server_learned_becomes_a_checkpoint(engine, tmp_path):
    async def work(client: Client) -> Any:
        for i in range(8):
            await client.prefer(f"question {i}", NEW, "alpha")
        return await client.learned(8)

    run(config_in(tmp_path), engine, work)
    given = ("adapt", str(engine.folder), "--learned", str(tmp_path / "state"), "-o")
    ended = p2l_engine(*given, str(tmp_path / "new"))
    assert ended.status == 0, ended.err
    assert f"8 votes of a service; new: {NEW}" in ended.message
    learner = state_of(tmp_path, engine)
    learner.refine()
    written = Engine(checkpoint.load(tmp_path / "new"), "cpu", "float32")
    assert written.models == (*tiny.MODELS, NEW)
    head, uncertainty = learner.head()
    states = hidden_states(engine, [f"question {i}" for i in range(12)])
    np.testing.assert_allclose(theta(written.head, states), theta(head, states), atol=1e-6)
    deviations = [each.deviation(torch.from_numpy(states)).numpy() for each in (written.uncertainty, uncertainty)]
    np.testing.assert_allclose(*deviations, atol=1e-6)

    async def more(client: Client) -> Any:
        await client.prefer("question 9", NEW, "beta")
        return await client.learned(1)

    # Another server goes on with it, and with the same log: no feedback counts twice.
    assert run(config_in(tmp_path, (), state=str(tmp_path / "again")), written, more)["learned"] == 1
    ended = p2l_engine(*given, str(tmp_path / "other"), "--drop", NEW)
    assert ended.status == 0, ended.err
    assert checkpoint.load(tmp_path / "other").models == tuple(tiny.MODELS)


@pytest.mark.slow
def test_a_state_that_is_not_the_checkpoints_is_refused(engine, tmp_path):
    async def work(client: Client) -> Any:
        await client.prefer("question", NEW, "alpha")
        return await client.learned(1)

    run(config_in(tmp_path), engine, work)
    other, target = tiny.write(tmp_path / "checkpoint", seed=1), str(tmp_path / "new")
    ended = p2l_engine("adapt", str(other), "--learned", str(tmp_path / "state"), "-o", target)
    assert "expected the state of a Learner" in ended.message
    assert "another head" in ended.message
    assert "no such file" in p2l_engine("adapt", str(other), "--learned", str(tmp_path / "none"), "-o", target).message
    both = p2l_engine("adapt", str(other), "--learned", str(tmp_path / "state"), "--votes", "votes.csv", "-o", target)
    assert "cannot be combined with --votes" in both.message


def descriptors() -> list[str]:
    """Those of this process that are still open once they are listed."""
    return [each for each in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{each}")]


@pytest.mark.slow
def test_what_cannot_learn_is_refused_by_name(engine, tmp_path):
    def refused(config: dict[str, Any], of: Engine = engine) -> str:
        with pytest.raises(ConfigError) as error:
            Runtime(settings.parse(config), of).application()
        return str(error.value)

    config = config_in(tmp_path)
    assert "serve.learn: needs an SQLite file under serve.store" in refused(
        {**config, "serve": {**config["serve"], "store": "postgresql+psycopg://host/name"}}
    )
    assert "expected a folder that can be written" in refused(config_in(tmp_path, state=str(tmp_path / "none" / "state")))
    (tmp_path / "file").write_text("")
    assert "expected a folder that can be written" in refused(config_in(tmp_path, state=str(tmp_path / "file")))
    assert "serve.learn.prompts" in refused(config_in(tmp_path, prompts=str(tmp_path / "none.jsonl")))
    with pytest.raises(ConfigError, match="serve.learn: works on one machine alone"):
        Runtime(settings.parse(config), engine, computer=Batcher(engine))

    async def nothing(client: Client) -> tuple[str, int]:
        why = refused(config)
        return why, sum(os.readlink(f"/proc/self/fd/{each}") == str(tmp_path / "state") for each in descriptors())

    why, opened = run(config, engine, nothing)
    assert "another process learns there" in why
    assert opened == 1  # the refused one keeps no lock
    for name, changes in (("head", {"seed": 1}), ("narrow", {"decoder": tiny.config(hidden_size=24, intermediate_size=40)})):
        other = Engine(checkpoint.load(tiny.write(tmp_path / name, **changes)), "cpu", "float32")
        assert "is of another checkpoint" in refused(config, other)
    state = tmp_path / "state" / "learner.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    assert "expected the state of a Learner" in refused(config)


@pytest.mark.parametrize("votes", slow_but((3,), [1, 3, 5]))
def test_a_log_that_was_replaced_is_read_from_its_beginning(votes, engine, tmp_path, caplog):
    """Also where it has as much feedback as the one before, or more."""
    config = config_in(tmp_path)

    async def work(client: Client) -> Any:
        for i in range(3):
            await client.prefer(f"question {i}", NEW, "alpha")
        return await client.learned(3)

    run(config, engine, work)
    for name in ("serve.sqlite", "serve.sqlite-wal", "serve.sqlite-shm"):
        (tmp_path / name).unlink(missing_ok=True)

    async def ask(client: Client) -> None:
        for i in range(votes):
            await client.prefer(f"question {i + 7}", NEW, "alpha")

    async def again(client: Client) -> Any:
        return await client.learned(3 + votes)

    run(config_in(tmp_path, more={"log_prompts": True}, state=str(tmp_path / "other")), engine, ask)
    assert run(config, engine, again)["learned"] == 3 + votes
    assert "the log is not the one of before" in caplog.text


def test_a_named_models_prompt_is_known_too(engine, tmp_path):
    """Also where no text is logged: a person compares two models that were named."""
    from bench.mock_provider import MockProvider

    async def one() -> Any:
        async with MockProvider() as provider:
            config = config_in(tmp_path)
            for entry in config["models"].values():
                entry["provider"][0]["base_url"] = f"{provider.url}/v1"
            async with serving(config, engine) as server, aiohttp.ClientSession() as http:
                client, ids = Client(server, http), []
                for model in ("alpha", NEW, "eta"):
                    body = {"model": model, "max_tokens": 20, "messages": [{"role": "user", "content": "same"}]}
                    async with http.post(f"{server.url}/v1/chat/completions", json=body) as response:
                        assert response.status == 200
                        ids.append(response.headers["x-p2l-decision"])
                await client.post("/v1/feedback", {"id": ids[0], "against": ids[1], "preference": "other"})
                await client.post("/v1/feedback", {"id": ids[0], "against": ids[2], "preference": "other"})
                return await client.learned(1)

    assert asyncio.run(one())["skipped"] == {lessons.UNKNOWN: 1}
    store = LogStore(tmp_path / "serve.sqlite", create=False)
    assert len({record.turns_hash for page in store.pages(Selection()) for record in page}) == 1
    store.close()
