"""One orchestrator and the workers it starts, from a cluster file to a running endpoint and back."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from configs.capacity import held_tokens
from configs.model_card import ModelCard, card_of
from configs.rank_shares import check_ranks
from configs.schema.cluster import ClusterConfig
from orchestrator.cli.model_source import resolve_model
from orchestrator.ingress.model import ServedModel, load_served_model
from orchestrator.ingress.moving import SignMove
from orchestrator.ingress.parts import IngressSettings
from orchestrator.ingress.server import IngressServer
from orchestrator.ingress.tasks import end_tasks
from orchestrator.runtime.capabilities import move_signer, prefix_signer, signer
from orchestrator.runtime.fleet import Fleet
from orchestrator.runtime.launcher import Launcher
from orchestrator.runtime.loop import CoreLoop, settings_of
from orchestrator.runtime.prefix_facts import PrefixFacts
from orchestrator.runtime.run_dir import RunDir
from orchestrator.store.client import Store
from orchestrator.store.embedded import EmbeddedValkey, socket_path
from protos.contract.capability import KeyFile, make_key_file

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]
MakeLauncher = Callable[[ClusterConfig, RunDir], Launcher]


def autan_version() -> str:
    """The version of the installed distribution."""
    try:
        return version("autan")
    except PackageNotFoundError:
        return "0+unknown"


class LocalCluster:
    """The parts of `autan up`, started in order and stopped in reverse.

    `async with` starts it and ends everything that it started, also when starting fails half way. `stop_requested` is set when
    an operator asks through the API; the owner of this object then calls `drain` and leaves the context.
    """

    def __init__(
        self,
        config: ClusterConfig,
        make_launcher: MakeLauncher,
        *,
        home: Path | None = None,
        progress: Progress = lambda text: None,
        failpoints: dict[str, dict[str, str]] | None = None,
    ) -> None:
        self.config = config
        self.run_dir = RunDir(config.name, home)
        self.stop_requested = asyncio.Event()
        self.stop_grace_s = config.timing.drain_s
        self._make_launcher = make_launcher
        self._progress = progress
        self._failpoints = failpoints or {}
        self._stack = AsyncExitStack()
        self.model_dir: Path | None = None
        self.store_url = ""
        self.embedded: EmbeddedValkey | None = None

    @property
    def endpoint(self) -> str:
        """Where clients connect."""
        return self.ingress.address

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def drain(self, grace_s: float) -> bool:
        """Takes no new requests and waits for the accepted ones; False when some are still running after `grace_s`."""
        await self.ingress.drain()
        return await self.ingress.wait_idle(grace_s)

    async def _start(self) -> None:
        config = self.config
        self.run_dir.acquire()
        self._stack.callback(self.run_dir.release)
        self._progress(f"model: {config.model.name} ({config.model.source})")
        self.model_dir = await resolve_model(config.model, self._progress)
        if self.model_dir is not None:
            check_ranks(config.pools, self.model_dir)
        card = self.card = self._served_card()
        await self._start_store()
        self.store = await Store.connect(self.store_url, config.name, config.store.timeout_s, config.timing.retain_s)
        self._stack.push_async_callback(self.store.close)
        self._progress(f"workers: {config.launcher.kind}")
        self.launcher = self._make_launcher(config, self.run_dir)
        self._stack.push_async_callback(self.launcher.close)
        # Before the first socket of gRPC: Ray forks with handlers, and a fork beside gRPC's threads may abort the child.
        node_address = await self.launcher.node_address()
        key_file = self._handoff_keys()
        sign_move = move_signer(lambda: key_file.keys)
        await self._start_ingress(load_served_model(config.model.name, card, self.model_dir), node_address, sign_move)
        sign = signer(lambda: key_file.keys)
        self.core = CoreLoop(
            self.store,
            settings_of(config),
            f"core-{secrets.token_hex(4)}",
            sign=sign,
            sign_move=sign_move,
            sign_prefix=prefix_signer(lambda: key_file.keys),
            prefixes=PrefixFacts(self.store, self.ingress.to_workers),
        )
        self._run("core", self.core.run())
        self.fleet = Fleet(
            config,
            self.launcher,
            self.store,
            store_url=self.store_url,
            model_dir=self.model_dir,
            failpoints=self._failpoints,
            handoff_keys_file=self.run_dir.handoff_keys,
            cache_dir=self.run_dir.cache,
        )
        await self.fleet.start(self._progress)
        self._run("fleet", self.fleet.keep_watch())
        self.run_dir.publish(self.ingress.local_address, autan_version())

    def _handoff_keys(self) -> KeyFile:
        make_key_file(self.run_dir.handoff_keys)
        return KeyFile(self.run_dir.handoff_keys)

    def _served_card(self) -> ModelCard:
        """The model's card with the context that the pools can hold: a longer request is refused, not left waiting."""
        card = card_of(self.config.model, self.model_dir)
        held = held_tokens(self.config.pools)
        if held >= card.context_tokens:
            return card
        self._progress(f"context: {held} tokens, which the KV blocks hold; the model has {card.context_tokens}")
        return replace(card, context_tokens=held)

    async def _start_store(self) -> None:
        if self.config.store.url is not None:
            self.store_url = self.config.store.url
            return
        self._progress(f"store: embedded, in {self.run_dir.store}")
        self.embedded = EmbeddedValkey(self.run_dir.store, self.config.store)
        await self._stack.enter_async_context(self.embedded)
        self.store_url = self.embedded.url

    async def _start_ingress(self, model: ServedModel, node_address: str, sign_move: SignMove) -> None:
        config = self.config
        settings = IngressSettings(
            config=config.ingress,
            version=autan_version(),
            lease_s=config.timing.lease_s,
            request_timeout_s=config.timing.request_timeout_s,
            max_queued=config.scheduling.max_queued,
            max_migrations=config.scheduling.max_migrations,
        )
        network = config.network
        self.ingress = IngressServer(
            node_address=network.advertise_host or node_address,
            settings=settings,
            network=config.network,
            store=self.store,
            model=model,
            on_shutdown=self._ask_to_stop,
            sign_move=sign_move,
            local_socket=socket_path(self.run_dir.path, "ingress.sock"),
        )
        await self.ingress.start()
        self._stack.push_async_callback(self.ingress.stop)

    def _ask_to_stop(self, grace_s: float) -> None:
        self.stop_grace_s = grace_s
        self.stop_requested.set()

    def _run(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Runs something for the life of the cluster; when it fails the cluster stops instead of limping on."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._task_ended)
        self._stack.push_async_callback(end_tasks, [task])

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            logger.error("%s ended unexpectedly", task.get_name(), exc_info=task.exception())
            self._ask_to_stop(0.0)
