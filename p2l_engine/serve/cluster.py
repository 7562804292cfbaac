"""A server on more than one machine: Ray Serve runs replicas of the engine, and of the server in front of them."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from starlette.applications import Starlette

from p2l_engine.batch.ray import check_address, cpus_per_worker
from p2l_engine.checkpoint import fingerprint
from p2l_engine.engine import Engine
from p2l_engine.engine.device import parse_device
from p2l_engine.serve import config_file
from p2l_engine.serve.engine_replicas import BATCH, CheckpointFacts, EngineReplica, RemoteEngines
from p2l_engine.serve.runtime import NOT_ON_A_CLUSTER, Runtime
from p2l_engine.serve.settings import Config, ConfigError
from p2l_engine.serve.shared_config import FollowedConfig, SharedConfig

logger = logging.getLogger(__name__)

NAME = "p2l-engine"  # of the application on the cluster
UNDER_WAY = 1_000  # requests at a front: most of them wait for a provider


class ServeCluster:
    """A server on a Ray cluster, from ``start`` to the end of a ``with``.

    engine: of the checkpoint; it computes nothing here. checkpoint: a folder that exists on every node, or a name; None for
    the default. address: "local" starts a cluster on this machine; otherwise "auto" or HOST:PORT of a cluster of
    which this machine is a node. host, port: where each node listens. engines: replicas; None for one per GPU or, without GPUs,
    one per node. fronts: replicas of the server; None for one per node. grace: seconds that requests get at the end.
    Raises ConfigError where the configuration needs one machine; ValueError; ConnectionError where no cluster answers.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        checkpoint: str | None,
        address: str = "local",
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        engines: int | None = None,
        fronts: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        grace: float = 30.0,
    ) -> None:
        _check_shared(config, address)
        kind = None if device is None else parse_device(device).type
        self._owns_connection = not ray.is_initialized()
        if self._owns_connection:
            check_address(address)
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._started = False
        with ExitStack() as undo:
            undo.callback(self.close)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            gpus, cpus = ([int(node.get(what, 0)) for node in nodes] for what in ("GPU", "CPU"))
            kind = kind or ("cuda" if sum(gpus) else "cpu")
            devices = sum(gpus if kind == "cuda" else cpus)
            self.engines = (sum(gpus) if kind == "cuda" else sum(n > 0 for n in cpus)) if engines is None else engines
            self.fronts = len(nodes) if fronts is None else fronts
            if not 1 <= self.engines <= devices:
                raise ValueError(f"engines: expected 1 to {devices}, the number of {kind} devices, got {self.engines}")
            if self.fronts < 1:
                raise ValueError(f"fronts: expected at least 1, got {self.fronts}")
            if serve.status().proxies:
                raise ValueError(f"address: the cluster at {address} runs Ray Serve already, whose address and port are fixed")
            undo.pop_all()
        if checkpoint is not None and Path(checkpoint).exists():
            checkpoint = str(Path(checkpoint).resolve())  # replicas run in other working directories
        arguments = (checkpoint, kind, dtype, engine.tokens_per_batch, engine.date, config.serve.prefix_cache_bytes)
        expected = fingerprint.of_checkpoint(engine.folder, engine.base)
        resources = {"num_gpus": 1, "num_cpus": 1} if kind == "cuda" else {"num_cpus": _cpus(cpus, self.engines)}
        of_engines = serve.deployment(num_replicas=self.engines, ray_actor_options=resources, max_ongoing_requests=4 * BATCH)
        of_fronts = serve.deployment(
            name="Front",
            num_replicas=self.fronts,
            ray_actor_options={"num_cpus": 0},
            max_ongoing_requests=UNDER_WAY,
            graceful_shutdown_timeout_s=grace,
        )
        uncertain = None if engine.uncertainty is None else engine.uncertainty.models
        facts = CheckpointFacts(engine.models, engine.feedback, engine.encoder.tokenizer, uncertain)
        actor: Any = ray.remote(num_cpus=0)(SharedConfig)
        self._address, self._shared = address, actor.remote(config)
        front = of_fronts(serve.ingress(_application(config, facts, self._shared))())
        self._application = front.bind(of_engines(EngineReplica).bind(arguments, expected))
        self._http = {"host": host, "port": port}

    def start(self) -> None:
        """Returns when all replicas are ready. Raises RuntimeError where they cannot start."""
        self._started = True
        quiet = {"log_level": "WARNING"}
        serve.start(proxy_location="EveryNode", http_options=self._http, logging_config=quiet)
        serve.run(self._application, name=NAME, logging_config=quiet)

    def adopt(self, config: Config) -> None:
        """Has all fronts use another configuration, each as one swap, within about a second. Raises ConfigError where it needs
        one machine; RayError where the cluster does not answer."""
        _check_shared(config, self._address)
        ray.get(self._shared.replace.remote(config))

    def close(self) -> None:
        """Ends the server, and the cluster if this object started it."""
        if self._started and ray.is_initialized():
            serve.shutdown()
        if self._owns_connection:
            ray.shutdown()

    def __enter__(self) -> ServeCluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Hangups:
    """asked: whether SIGHUP came since it was last set to False."""

    asked = False


@contextmanager
def signals_answered() -> Iterator[Hangups]:
    """SIGTERM is as Ctrl-C; Ray sets its own handler when it connects, which ends the process at once. SIGHUP is noted."""
    found = Hangups()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def note(*_: object) -> None:
        found.asked = True

    before = signal.signal(signal.SIGTERM, interrupt), signal.signal(signal.SIGHUP, note)
    try:
        yield found
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])


def until_stopped(cluster: ServeCluster, runtime: Runtime, hangups: Hangups) -> None:
    """Waits for SIGTERM or Ctrl-C. Meanwhile the fronts follow the file that ``runtime`` was made from: it is read again when
    it changes, and at SIGHUP; one that cannot be used changes nothing and is logged."""
    file, now = runtime.file, runtime.plan.config
    seen = None if file is None else file.stamp()
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(config_file.EVERY)
            stamp = None if file is None else file.stamp()
            if file is None or stamp is None or not (hangups.asked or stamp != seen):
                continue
            hangups.asked, seen = False, stamp
            try:
                config = file.after(now)
                plan = runtime.planned(config)
                cluster.adopt(config)
            except (ValueError, RayError) as error:
                logger.error("the configuration was not changed: %s", error)
                continue
            now = config
            logger.warning("the configuration was read again: %d models", len(plan.names))
            for line in plan.notes:
                logger.warning("%s", line)


def _application(config: Config, facts: CheckpointFacts, shared: Any) -> Callable[[], Starlette]:
    """Makes a front's application, on its machine."""

    def build() -> Starlette:
        engines = serve.get_deployment_handle(EngineReplica.__name__, app_name=NAME)
        source = FollowedConfig(shared, config)
        return Runtime(config, facts, computer=RemoteEngines(engines, facts), source=source).application()

    return build


def _check_shared(config: Config, address: str) -> None:
    """Raises ConfigError for files, which machines do not share, and for learning."""
    if config.serve.learn is not None:
        raise ConfigError(NOT_ON_A_CLUSTER)
    if address == "local":
        return
    store, cache = config.serve.store, config.serve.cache
    if store is not None and not store.startswith("postgresql"):
        raise ConfigError(f"serve.store: on a cluster, expected the URL of a PostgreSQL database, got {store!r}")
    if cache is not None and cache.store != "memory" and "://" not in cache.store:
        raise ConfigError(f"serve.cache.store: on a cluster, expected memory or redis://HOST:PORT, got {cache.store!r}")


def _cpus(cpus: Sequence[int], engines: int) -> int:
    """Of each engine; one of its CPUs is left to the rest of the server."""
    return max(1, cpus_per_worker(cpus, engines) - 1)
