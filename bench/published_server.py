"""A router of the design that lmarena/p2l publishes, as a peer for benchmarks: python -m bench.published_server engine|router.

Two processes. The engine has ``POST /predict`` (p2l/endpoint.py): one forward pass for each request, in the event loop. The
router has ``POST /v1/chat/completions`` (route/openai_server.py, routers.py, cost_optimizers.py, chat.py): it asks the engine
with ``requests``, takes the model of the highest coefficient or, under a cost, solves a linear program with cvxpy, makes a
client of OpenAI's for the request, and calls it, all in the event loop; streams run in threads. Nothing is cached. Bodies and
answers are pydantic models, and both processes log what they get, as published; without FastAPI, which this project does not
use, and with this project's engine instead of transformers' pipeline, both in its favour.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import requests
import uvicorn
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


class Message(BaseModel):
    """Only text."""

    role: str
    content: str
    model: str | None = None


class Body(BaseModel):
    """What the router takes of a request; other fields are dropped."""

    model: str
    messages: list[Message]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = False
    cost: float | None = None


class Choice(BaseModel):
    """One answer, or a piece of it."""

    index: int
    message: Message | None = None
    delta: dict[str, Any] | None = None
    finish_reason: str | None = None


class Completion(BaseModel):
    """An answer, or a piece of it."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Any = None
    router_outputs: dict[str, float] | None = None


def engine(checkpoint: str | None) -> Starlette:
    """Coefficients of one prompt."""
    from p2l_engine import Engine

    found = Engine.from_pretrained(checkpoint)
    found.warmup()

    async def predict(request: Request) -> Response:
        turns = (await request.json())["prompt"]
        logging.debug("Input prompt: %s", turns)
        coefficients = found.coefficients([turns])
        eta = None if coefficients.eta is None else float(coefficients.eta[0])
        logging.debug("Output: %s", coefficients)
        return JSONResponse({"coefs": coefficients.theta[0].tolist(), "eta": eta})

    async def models(request: Request) -> Response:
        return JSONResponse({"models": list(found.models)})

    return Starlette(routes=[Route("/predict", predict, methods=["POST"]), Route("/models", models)])


def router(settings: dict[str, Any]) -> Starlette:
    """settings: engine and provider, URLs; costs by model."""
    import openai

    ranked = requests.get(f"{settings['engine']}/models", headers={"api-key": "-"}, timeout=60).json()["models"]
    costs = np.array([settings["costs"][name] for name in ranked])

    def route(messages: list[Message], cost: float | None) -> tuple[str, dict[str, float]]:
        prompt = [message.content for message in messages if message.role == "user"]
        answer = requests.post(
            f"{settings['engine']}/predict",
            headers={"content-type": "application/json", "api-key": "-"},
            data=json.dumps({"prompt": prompt}),
            timeout=600,
        )
        answer.raise_for_status()
        coefficients = np.array(answer.json()["coefs"])
        scores = 1 / (1 + np.exp(-coefficients))
        name = ranked[int(np.argmax(scores))] if cost is None else _cheapest(ranked, costs, scores, cost)
        return name, dict(zip(ranked, scores.tolist(), strict=True))

    def create(body: Body, name: str) -> Any:
        client = openai.OpenAI(base_url=settings["provider"], api_key="-")
        return client.chat.completions.create(
            model=name,
            messages=[message.model_dump(exclude_none=True) for message in body.messages],  # type: ignore[misc]
            temperature=body.temperature or 0.7,
            top_p=body.top_p or 1.0,
            max_tokens=body.max_tokens,
            stream=bool(body.stream),
        )

    def stream(body: Body, name: str, scores: dict[str, float]) -> Iterator[str]:
        text, first = "", True
        for chunk in create(body, name):
            if not chunk.choices or not chunk.choices[0].delta.content:
                continue
            text += chunk.choices[0].delta.content
            choices = [
                Choice(index=c.index, delta={"role": c.delta.role, "content": c.delta.content, "model": name})
                for c in chunk.choices
            ]
            outputs = scores if first else None
            piece = Completion(
                id=chunk.id, object="chat.completion.chunk", created=chunk.created, model=chunk.model, choices=choices,
                usage=chunk.usage, router_outputs=outputs,
            )  # fmt: skip
            yield f"data: {piece.model_dump_json()}\n\n"
            first = False
        logging.info("%d Chat Output (OpenAI Client): %s", time.time(), text)
        yield "data: [DONE]\n\n"

    async def complete(request: Request) -> Response:
        body = Body.model_validate(await request.json())
        logging.info("%d Received Request: %s", time.time(), body)
        name, scores = route(body.messages, body.cost)
        logging.info("%d Router Output: %s %s", time.time(), name, scores)
        if body.stream:
            return StreamingResponse(stream(body, name, scores), media_type="text/event-stream")
        found = create(body, name)
        logging.info("%d Chosen Model Completion: %s", time.time(), found)
        choices = [
            Choice(
                index=choice.index,
                message=Message(role=choice.message.role, content=choice.message.content, model=name),
                finish_reason=choice.finish_reason,
            )
            for choice in found.choices
        ]
        whole = Completion(
            id=found.id, object="chat.completion", created=found.created, model=found.model, choices=choices,
            usage=found.usage, router_outputs=scores,
        )  # fmt: skip
        return Response(whole.model_dump_json(), media_type="application/json")

    async def models(request: Request) -> Response:
        return JSONResponse(ranked)

    return Starlette(routes=[Route("/v1/chat/completions", complete, methods=["POST"]), Route("/v1/models", models)])


def _cheapest(names: list[str], costs: Any, scores: Any, cost: float) -> str:
    """A draw from the policy of the highest score within a cost."""
    import cvxpy

    p = cvxpy.Variable(len(costs))
    cvxpy.Problem(cvxpy.Maximize(cvxpy.sum(scores @ p)), [costs @ p <= cost, cvxpy.sum(p) == 1, p >= 0]).solve()
    found = np.clip(p.value, 0.0, 1.0)
    return str(np.random.default_rng().choice(names, p=found / found.sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("engine", "router"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--checkpoint", help="of the engine; the default one without it")
    parser.add_argument("--settings", type=Path, help="of the router: a JSON file")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stdout, level=logging.DEBUG)
    if arguments.part == "engine":
        app = engine(arguments.checkpoint)
    elif arguments.settings is None:
        parser.error("router: expected --settings")
    else:
        app = router(json.loads(arguments.settings.read_text(encoding="utf-8")))
    uvicorn.run(app, host="127.0.0.1", port=arguments.port)


if __name__ == "__main__":
    main()
