"""A server on a local Ray cluster: two fronts, two engines, one PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import pickle
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest
import yaml

from bench.load.process import free_port
from bench.mock_provider import MockProvider
from p2l_engine.coefficients import ExpectedUsage
from p2l_engine.errors import PromptError
from p2l_engine.serve import settings
from p2l_engine.serve.service import Refused
from p2l_engine.serve.settings import ConfigError
from tests.support import postgres
from tests.support.command import p2l_engine

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.xdist_group("clusters"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*", "ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]

PRICE = {"usd_per_m_in": 3.0, "usd_per_m_out": 15.0, "tokens_in": 100, "tokens_out": 50, "max_output": 1000, "cached_from": 1}


@pytest.fixture(scope="module")
def serve_cluster():
    """The module; skips where Ray Serve is not installed. Ray's workers compute with one thread, at the tests' priority."""
    pytest.importorskip("ray", reason="Ray is not installed")
    pytest.importorskip("fastapi", reason="Ray Serve is not installed (extra serve-ray)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_worker_niceness", "0")
        from p2l_engine.serve import cluster

        yield cluster


def command_of(process: psutil.Process) -> str:
    """Nothing where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def config(models: Any, provider: str, **serve: Any) -> settings.Config:
    entries = {name: {**PRICE, "provider": {"base_url": provider, "model": name, "api": "responses"}} for name in models}
    return settings.parse({"models": entries, "serve": serve})


@pytest.fixture
def url(postgres_url):
    yield postgres_url
    postgres.empty(postgres_url)


def test_fronts_share_engines_limits_and_sessions(serve_cluster, engine, url):
    import ray

    port = free_port()
    if ray.is_initialized():
        ray.shutdown()
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    prices = {name: (3.0, 15.0, 0.3) for name in engine.models}

    async def one() -> None:
        async with MockProvider(prices) as provider:
            serve = {
                "limits": [{"amount": 0.05}],
                "over_limit": "refuse",
                "queue": {"seconds": 60},
            }  # a new replica takes seconds
            made = config(engine.models, f"{provider.url}/v1", store=url, **serve)

            def start() -> Any:
                return serve_cluster.ServeCluster(
                    made, engine, str(engine.folder), "local", port=port, engines=2, fronts=2, device="cpu", dtype="float32"
                )

            running = await asyncio.to_thread(start)
            try:
                await asyncio.to_thread(running.start)
                with pytest.raises(ValueError, match="runs Ray Serve already"):
                    await asyncio.to_thread(start)
                await used(provider, f"http://127.0.0.1:{port}")
            finally:
                await asyncio.to_thread(running.close)

    async def used(provider: MockProvider, base: str) -> None:
        async with aiohttp.ClientSession() as client:
            prompts = [f"question {i}" for i in range(20)]

            async def post(path: str, body: dict[str, Any]) -> tuple[int, Any, Any]:
                async with client.post(base + path, json=body) as response:
                    data = await response.read()
                    return response.status, response.headers, data

            # The engines' coefficients are those of one machine.
            status, _, data = await post("/v1/coefficients", {"prompts": prompts})
            assert status == 200
            found = json.loads(data)
            alone = engine.coefficients(prompts)
            np.testing.assert_allclose(found["theta"], alone.theta, atol=1e-5)
            np.testing.assert_allclose(found["eta"], alone.eta, atol=1e-5)
            assert found["models"] == list(engine.models)

            # Requests and streams of all fronts reach the provider, and its bill is what the ledger has spent.
            bodies = [
                {"model": "auto", "input": text, "max_output_tokens": 60, "stream": i % 2 == 0}
                for i, text in enumerate(prompts)
            ]
            answers = await asyncio.gather(*(post("/v1/responses", body) for body in bodies))
            assert {status for status, _, _ in answers} == {200}
            assert all(
                b"response.completed" in data for (_, _, data), body in zip(answers, bodies, strict=True) if body["stream"]
            )
            assert len({headers["x-p2l-decision"] for _, headers, _ in answers}) == 20

            async def spent() -> float:
                async with client.get(base + "/v1/status") as response:
                    (limit,) = (await response.json())["limits"]
                    return limit["spent"] if not limit["reserved"] else -1

            for _ in range(500):
                if await spent() == pytest.approx(float(provider.bill.total), abs=1e-9):
                    break
                await asyncio.sleep(0.02)
            assert await spent() == pytest.approx(float(provider.bill.total), abs=1e-9)

            # Whichever front gets it, a conversation goes on where its provider has it.
            first = json.loads(answers[1][2])
            for _ in range(8):
                status, headers, data = await post(
                    "/v1/responses",
                    {"model": "auto", "input": "go on", "previous_response_id": first["id"], "max_output_tokens": 9},
                )
                assert (status, headers["x-p2l-model"]) == (200, first["model"]), data

            # A hard limit holds over all fronts.
            large = {"model": "auto", "input": "much", "max_output_tokens": 1000}
            refused = await asyncio.gather(*(post("/v1/responses", {**large, "user": str(i)}) for i in range(16)))
            assert {status for status, _, _ in refused} == {200, 402}
            assert float(provider.bill.total) <= 0.05

            # An engine that is killed takes nothing with it.
            killed = [p for p in psutil.Process().children(recursive=True) if "EngineReplica" in command_of(p)]
            assert len(killed) == 2
            killed[0].kill()
            decided = await asyncio.gather(*(post("/v1/route", {"input": f"new {i}"}) for i in range(20)))
            assert {status for status, _, _ in decided} == {200}

            status, _, data = await post("/v1/responses", {"model": "unknown", "input": "x"})
            assert (status, json.loads(data)["error"]["code"]) == (404, "model_not_found")

    try:
        asyncio.run(one())
    finally:
        ray.shutdown()


@pytest.mark.parametrize(
    ("serve", "message"),
    [
        (
            {"store": "serve.sqlite"},
            r"serve\.store: on a cluster, expected the URL of a PostgreSQL database, got 'serve.sqlite'",
        ),
        (
            {"store": "serve.sqlite", "learn": {"state": "state"}},
            r"serve\.learn: works on one machine alone.*'p2l-engine adapt'",
        ),
        ({"cache": {"store": "a.sqlite"}}, r"serve\.cache\.store: on a cluster, expected memory or redis"),
    ],
)
def test_machines_do_not_share_files(serve, message, serve_cluster, engine):
    with pytest.raises(ConfigError, match=message):
        serve_cluster.ServeCluster(config(engine.models, "http://127.0.0.1:9", **serve), engine, None, "127.0.0.1:9")


def test_addresses_are_checked(serve_cluster, engine):
    import ray

    if ray.is_initialized():
        ray.shutdown()
    made = config(engine.models, "http://127.0.0.1:9")
    for address, error, message in (
        ("127.0.0.1:9", ConnectionError, "expected a Ray cluster's head at 127.0.0.1:9, nothing answers there"),
        ("nonsense", ValueError, "address: expected local, auto or HOST:PORT, got 'nonsense'"),
    ):
        with pytest.raises(error, match=message):
            serve_cluster.ServeCluster(made, engine, None, address)
    assert not ray.is_initialized()


class Handle:
    """A deployment's handle; outcomes: of its calls, in order."""

    def __init__(self, *outcomes: Any) -> None:
        self.coefficients, self.outcomes, self.prompts = self, list(outcomes), list[Any]()

    async def remote(self, prompt: Any) -> Any:
        self.prompts.append(prompt)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def test_a_replica_that_dies_is_replaced_by_another(serve_cluster, engine, monkeypatch):
    from ray.exceptions import ActorDiedError
    from ray.serve.exceptions import DeploymentUnavailableError

    from p2l_engine.serve import engine_replicas

    monkeypatch.setattr(engine_replicas, "TRIES", (0.0, 0.0, 0.0))
    facts = engine_replicas.CheckpointFacts(engine.models, engine.feedback, engine.encoder.tokenizer)
    alone = engine.coefficients(["hello"])
    usage = ExpectedUsage(np.ones(1, np.float32), np.exp(alone.theta), None, np.ones(alone.theta.shape[1], bool))
    row = (alone.theta[0], float(alone.eta[0]), alone.theta[0] ** 2, usage, 0.62)

    def asked(*outcomes: Any) -> Any:
        async def one() -> Any:
            engines = engine_replicas.RemoteEngines(Handle(*outcomes), facts)
            return await asyncio.wrap_future(engines.submit(["hello"], lambda found: found))

        return asyncio.run(one())

    for outcomes in ([row], [ActorDiedError(), row], [ActorDiedError(), DeploymentUnavailableError(None), row]):
        found = asked(*outcomes)
        np.testing.assert_array_equal(found.theta, alone.theta)
        np.testing.assert_array_equal(found.eta, alone.eta)
        np.testing.assert_array_equal(found.deviation, alone.theta**2)
        assert found.usage is usage
        np.testing.assert_array_equal(found.kept, np.float32([0.62]))
        assert (found.models, found.feedback) == (engine.models, engine.feedback)
    with pytest.raises(Refused) as refused:
        asked(ActorDiedError(), ActorDiedError(), ActorDiedError())
    assert (refused.value.status, refused.value.retry_after) == (503, 5.0)
    with pytest.raises(PromptError, match="the template refuses it"):
        asked("the template refuses it")
    with pytest.raises(ZeroDivisionError):
        asked(ZeroDivisionError())


def test_a_prompt_that_is_refused_fails_alone(serve_cluster, engine, monkeypatch):
    from p2l_engine.serve.engine_replicas import EngineReplica

    replica = object.__new__(EngineReplica)
    replica.engine = engine
    whole = engine.coefficients

    def refusing(prompts: Any) -> Any:
        for i, prompt in enumerate(prompts):
            if "bad" in prompt[0]:
                raise PromptError(i, "the template refuses it")
        return whole(prompts)

    monkeypatch.setattr(engine, "coefficients", refusing)
    rows = replica._rows([["one"], ["bad"], ["two"], ["bad"]])
    assert rows[1] == rows[3] == "the template refuses it"
    np.testing.assert_allclose([rows[0][0], rows[2][0]], whole(["one", "two"]).theta, atol=1e-5)
    assert rows[0][2:] == (None, None, None)  # this checkpoint has neither uncertainty nor lengths nor a shrinkage
    usage = ExpectedUsage(np.ones(2, np.float32), np.array([[1.0], [2.0]], np.float32), None, np.ones(1, bool))
    monkeypatch.setattr(engine, "coefficients", lambda prompts: replace(whole(prompts), usage=usage))
    assert [row[3].tokens_out.tolist() for row in replica._rows([["one"], ["two"]])] == [[[1.0]], [[2.0]]]
    kept = np.float32([0.5, 1.0])
    monkeypatch.setattr(engine, "coefficients", lambda prompts: replace(whole(prompts), kept=kept))
    assert [row[4] for row in replica._rows([["one"], ["two"]])] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray", "local"], "error: --ray: needs fastapi: pip install 'p2l-engine[serve-ray]'"),
        (["--ray-fronts", "2"], "needs --ray"),
    ],
)
def test_what_the_command_refuses(options, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [
        name
        for name in sys.modules
        if name.startswith(("ray.serve", "p2l_engine.serve.cluster", "p2l_engine.serve.engine_replicas"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    ended = p2l_engine("serve", *options)
    assert (ended.status, message in ended.message) == (2, True), ended.err


def test_a_tokenizer_travels_to_other_machines(engine):
    tokenizer = engine.encoder.tokenizer
    engine.coefficients(["compiles its template"])
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert copied.ids(["hello there"]) == tokenizer.ids(["hello there"])
    assert copied.template.render(["a", "b"]) == tokenizer.template.render(["a", "b"])


@pytest.mark.slow
def test_the_command_serves_on_a_cluster_of_its_own_until_it_is_told_to_stop(serve_cluster, engine, tmp_path):
    port = free_port()
    file = tmp_path / "serve.yaml"
    values = {"checkpoint": str(engine.folder), "models": {name: {"cost": 1} for name in engine.models}}
    file.write_text(yaml.safe_dump(values))
    options = ["--config", file, "--port", str(port), "--ray", "local", "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "p2l_engine", "serve", *options], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )

    def asked() -> Any:
        body = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/route", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.loads(response.read())

    def catalog() -> list[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30) as response:
            return [model["id"] for model in json.loads(response.read())["data"]]

    try:
        said = ""
        while "Ctrl-C stops it" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        assert asked()["model"] in engine.models
        process.send_signal(signal.SIGHUP)
        assert f"the configuration was read again: {len(engine.models)} models" in process.stderr.readline()
        best = engine.models[0]
        file.write_text(yaml.safe_dump({**values, "models": {best: {"cost": 1}}}))
        assert "the configuration was read again: 1 models" in process.stderr.readline()
        assert "left out of the choice" in process.stderr.readline()
        for _ in range(100):
            if set(catalog()) == {"auto", best}:
                break
            time.sleep(0.1)
        assert set(catalog()) == {"auto", best}
        assert asked()["model"] == best
        for bad in ({**values, "modles": {}}, {**values, "serve": {"learn": {"state": "x"}, "store": "a.sqlite"}}):
            file.write_text(yaml.safe_dump(bad))
            assert "the configuration was not changed: " in process.stderr.readline()
        assert asked()["model"] == best
        process.send_signal(signal.SIGTERM)
        _, last = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, last) == (0, "")
    assert said.split("\n")[-2] == f"http://127.0.0.1:{port}, 1 engines, 1 fronts  (Ctrl-C stops it)"
    with pytest.raises(OSError, match="refused"):
        asked()
