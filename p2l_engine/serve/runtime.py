"""A server from start to end: its parts are made, the configuration is watched, and everything is settled before it stops."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette

from p2l_engine.apis.ask import Capability
from p2l_engine.catalog import Catalog
from p2l_engine.decision_log.log import DecisionLog
from p2l_engine.decision_log.record import Record
from p2l_engine.engine.batcher import Batcher
from p2l_engine.exploration import NO_UNCERTAINTY
from p2l_engine.routing import SpendLimit
from p2l_engine.serve import settings
from p2l_engine.serve.answers import open_answers
from p2l_engine.serve.app import application
from p2l_engine.serve.async_spend_limit import AsyncSpendLimit
from p2l_engine.serve.config_file import ConfigFile, ConfigSource, adapted
from p2l_engine.serve.encodings import counters
from p2l_engine.serve.expectations import Expectations
from p2l_engine.serve.gate import Gate
from p2l_engine.serve.health import Health
from p2l_engine.serve.plan import Plan, make
from p2l_engine.serve.scorer import Computer, Scorer
from p2l_engine.serve.server import Server
from p2l_engine.serve.service import Service, pacer_of
from p2l_engine.serve.sessions import SessionMemory
from p2l_engine.serve.settings import Config, ConfigError, Serve
from p2l_engine.serve.shared_sessions import SharedSessions
from p2l_engine.serve.tokens import TokenCounter, as_text
from p2l_engine.serve.traces import Traces
from p2l_engine.serve.upstream import Upstream

logger = logging.getLogger(__name__)

SWEEP = 60.0  # seconds between sweeps of what dead processes have reserved, and of answers that are too old
NOT_ON_A_CLUSTER = (
    "serve.learn: works on one machine alone: replicas on a cluster would each learn something else; serve without --ray, or "
    "learn from the log export with 'p2l-engine adapt'"
)


class Runtime:
    """Makes the application for an engine and a configuration. file: where that came from, to be read again when it changes;
    source: the same, where it is no file.

    watch: is shown the record of each decision. log_prompts: keep the text of prompts whatever the file says. engine: of the
    checkpoint that the configuration names. computer: computes coefficients in its place; then it is asked for its models, its
    feedback model, its tokenizer and whether it has an uncertainty alone.
    """

    def __init__(
        self,
        config: Config,
        engine: Any,
        file: Path | None = None,
        watch: Callable[[Record], None] | None = None,
        computer: Computer | None = None,
        log_prompts: bool = False,
        source: ConfigSource | None = None,
    ) -> None:
        self.file = None if file is None else ConfigFile(file, log_prompts)
        self.source = source or self.file
        config = adapted(config, log_prompts)
        self.learning = None
        self._prefixes = None if computer is not None else engine.prefix_cache
        if (learn := config.serve.learn) is not None:
            if computer is not None:
                raise ConfigError(NOT_ON_A_CLUSTER)
            from p2l_engine.serve.learn import OnlineLearning  # loads what adapt needs

            self.learning = OnlineLearning(learn, engine, config.serve.retention_days)
            engine = self.learning.engine
        self.engine, self.watch, self.computer = engine, watch, computer
        self.plan = self.planned(config)
        self.counters, self.notes = counters(config.models)
        self.notes += [] if self.learning is None else self.learning.lines()
        self.server: Server | None = None
        self._reading = asyncio.Lock()

    def planned(self, config: Config) -> Plan:
        """The plan of a configuration. Raises ConfigError, also for a key that is not in the environment."""
        if config.serve.explore is not None and self.engine.uncertainty is None:
            raise ConfigError(f"serve.{NO_UNCERTAINTY}")
        models = self.engine.models
        if self.learning is not None and config.serve.learn is not None:
            models = (*models, *(new.name for new in self.learning.additions(config.serve.learn)))
        return make(config, models, self.engine.feedback)

    def application(self) -> Starlette:
        """The ASGI application; its lifespan makes the parts that belong to an event loop."""
        cache = self.plan.serve.cache
        answers = None if cache is None else open_answers(cache)
        self.server = Server(self._service(), _log(self.plan), self.watch, answers)
        if self._prefixes is not None:
            self.server.metrics.show_prefixes(self._prefixes)
        if self.plan.serve.traces:
            self.server.traces = Traces()
        if self.learning is not None:
            assert self.server.log is not None
            self.learning.open(self.server.log)
            self.server.learning = self.learning
            self.server.metrics.show(self.learning)
        app = application(self.server)
        app.router.lifespan_context = self._lifespan
        return app

    def _service(self) -> Service:
        plan, serve = self.plan, self.plan.serve
        return Service(
            plan,
            Scorer(
                self.computer or Batcher(self.engine),
                serve.queue.seconds,
                serve.queue.most,
                serve.queue.cached,
                None if self.learning is None else self.learning.engine.renewed,
            ),
            TokenCounter(as_text(self.engine.encoder.tokenizer)),
            Upstream(),
            AsyncSpendLimit(_spend_limit(plan), serve.timeouts.total),
            _sessions(serve),
            Health(serve.cooldown),
            Gate(serve.keys),
            pacer_of(plan),
            Expectations(plan.config.models),
            self.counters,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        assert self.server is not None
        service = self.server.service
        service.upstream.open()
        service.sessions.open()
        tasks = [_background(self._sweep())]
        if self.source is not None:
            tasks.append(_background(self._watch()))
            if threading.current_thread() is threading.main_thread():
                loop = asyncio.get_running_loop()
                loop.add_signal_handler(signal.SIGHUP, lambda: tasks.append(_background(self._reload())))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await service.upstream.close()
            await service.sessions.close()
            await service.spending.drain()
            service.spending.close()
            await asyncio.to_thread(service.scorer.close)
            if self.learning is not None:
                await asyncio.to_thread(self.learning.close)
            if self.server.answers is not None:
                await self.server.answers.close()
            if self.server.log is not None:
                await asyncio.to_thread(self.server.log.close)
            if self.server.traces is not None:
                await asyncio.to_thread(self.server.traces.close)

    async def reload(self) -> bool:
        """Reads the configuration again. One that cannot be used keeps the present one and is logged."""
        assert self.server is not None
        assert self.source is not None
        async with self._reading:
            before = self.plan
            try:
                config = await asyncio.to_thread(self.source.after, before.config)
                plan = self.planned(config)
                was = limit = self.server.service.spending.limit
                if plan.serve.limits != before.serve.limits:
                    # Without limits too, where there were some: what is reserved must be settled.
                    limit = await asyncio.to_thread(_spend_limit, plan, was is not None)
                found, notes = await asyncio.to_thread(counters, config.models)
                if self.learning is not None and config.serve.learn is not None:
                    await asyncio.to_thread(self.learning.adopt, config.serve.learn)
            except (ValueError, SQLAlchemyError) as error:
                logger.error("the configuration was not changed: %s", error)
                return False
            except Exception:  # whatever it is, the server keeps running, and reads the file again when it changes
                logger.exception("the configuration was not changed")
                return False
            service = self.server.service
            service.adopt(plan)
            service.own_counters, self.notes = found, notes
            service.spending.adopt(limit, plan.serve.timeouts.total)
            self.plan = plan
            self.server.metrics.names = frozenset(plan.names)
            logger.warning("the configuration was read again: %d models", len(plan.names))
            for line in notes:
                logger.warning("%s", line)
            if was is not None and was is not limit:
                await asyncio.to_thread(was.close)
            return True

    async def _reload(self) -> None:
        await self.reload()

    async def _watch(self) -> None:
        """Reads the configuration again when it has changed."""
        assert self.source is not None
        async for _ in self.source.changes(self.plan.config):
            await self.reload()

    async def _sweep(self) -> None:
        assert self.server is not None
        while True:
            try:
                await self.server.service.spending.sweep()
            except SQLAlchemyError as error:
                logger.error("reservations of dead processes are not counted yet: the store fails (%s)", type(error).__name__)
            if self.server.answers is not None:
                await self.server.answers.prune()
            await asyncio.sleep(SWEEP)


def decisions_only(engine: Any) -> Config:
    """The configuration of a server without a file: the checkpoint's own catalog, at one price for each request."""
    file = engine.folder / "catalog.yaml"
    if not file.is_file():
        raise ConfigError(f"the checkpoint has no catalog.yaml: give a configuration with --config ({file} not found)")
    catalog = Catalog.from_yaml(file)
    everything = get_args(Capability)  # nothing is sent
    models = {
        model.name: {
            "cost": model.cost,
            "accepts": everything if model.accepts is None else model.accepts,
            "context": model.context,
        }
        for model in catalog.models
    }
    return settings.parse({"models": models, "unit": catalog.unit}, str(file))


def _log(plan: Plan) -> DecisionLog | None:
    serve = plan.serve
    if serve.store is None:
        return None
    return DecisionLog(serve.store, retention=None if serve.retention_days is None else timedelta(days=serve.retention_days))


def _sessions(serve: Serve) -> SessionMemory:
    seconds, most = serve.sessions.cache_seconds, serve.sessions.most
    if serve.store is not None and serve.store.startswith("postgresql"):
        return SharedSessions(serve.store, seconds, most)
    return SessionMemory(seconds, most)


def _spend_limit(plan: Plan, always: bool = False) -> SpendLimit | None:
    """always: also for no limit."""
    serve = plan.serve
    if not (serve.limits or always) or serve.store is None:
        return None
    # Reservations never expire by themselves: those of dead processes are swept, and counted in full.
    return SpendLimit([entry.limit for entry in serve.limits], serve.store, lifetime=None)


def _background(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task whose failure is logged when it happens."""
    task = asyncio.create_task(work)
    task.add_done_callback(_log_failure)
    return task


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a task of the server failed", exc_info=error)
