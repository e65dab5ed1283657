"""What prefill and decode do alike as processes."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

from baton.core.errors import BatonError, WorkerDraining
from baton.rpc.runtime import Runtime, ServiceSnapshot
from baton.worker.host import EngineHost
from baton.worker.settings import WorkerSettings

logger = logging.getLogger(__name__)


class Requests(Protocol):
    """The requests that run on a worker's engine."""

    def __len__(self) -> int: ...

    def end_all(self, error: BatonError) -> None:
        """Fails all of them and lets go of what they hold."""

    def sweep_once(self, now: float) -> None:
        """Ends leases that are over at `now`."""


class LoadedParts(Protocol):
    """What a worker has while its model is loaded."""

    @property
    def host(self) -> EngineHost:
        """The engine in its process."""

    @property
    def requests(self) -> Requests:
        """What runs on it."""

    async def wait_idle(self) -> None:
        """Returns once no request runs."""

    async def close(self) -> None:
        """Frees the rest; called when no request runs, and before the engine stops."""


SettingsT = TypeVar("SettingsT", bound=WorkerSettings)
PartsT = TypeVar("PartsT", bound=LoadedParts)


class WorkerService(ABC, Generic[SettingsT, PartsT]):
    """Loads a model, admits requests, drains and stops. See `baton.rpc.runtime.Service`."""

    num_copiers = 1
    """Threads that copy KV."""

    def __init__(self, runtime: Runtime[SettingsT]) -> None:
        self._runtime = runtime
        self._settings = runtime.settings
        self._loaded: PartsT | None = None

    @abstractmethod
    def make_parts(self, host: EngineHost) -> PartsT:
        """Puts together what runs requests on a loaded engine."""

    @abstractmethod
    def snapshot(self) -> ServiceSnapshot:
        """Load and blocks now."""

    async def start(self) -> None:
        """Loads the model."""
        host = await EngineHost.load(self._runtime, num_copiers=self.num_copiers)
        self._loaded = self.make_parts(host)
        host.keep_house(self._loaded.requests.sweep_once)

    def loaded(self) -> PartsT:
        """The loaded parts, for calls that continue a request.

        Raises:
            WorkerDraining: the model is not loaded yet, or is unloaded.
        """
        if self._loaded is None:
            raise WorkerDraining("the worker is not ready")
        return self._loaded

    def admitting(self) -> PartsT:
        """The loaded parts, for calls that begin a request.

        Raises:
            WorkerDraining: the worker takes nothing new.
        """
        if self._runtime.is_draining:
            raise WorkerDraining("the worker is draining: take another one")
        return self.loaded()

    def kv_snapshot(self) -> tuple[int, list[bytes]]:
        """Hashes in the prefix cache."""
        return self.loaded().host.engine.kv_snapshot()

    async def drain(self, grace_s: float) -> None:
        """Waits for running requests, and fails those that are left: they go on elsewhere."""
        if self._loaded is None:
            return
        loaded = self._loaded
        try:
            async with self._runtime.clock.timeout(grace_s):
                await loaded.wait_idle()
        except TimeoutError:
            logger.warning("drain cut off", extra={"num_requests": len(loaded.requests)})
        finally:  # also when the drain itself is cancelled
            loaded.requests.end_all(WorkerDraining("the worker stops, and its grace is over"))

    async def stop(self) -> None:
        """Ends what still runs and unloads the model."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.requests.end_all(WorkerDraining("the worker has stopped"))
            await loaded.close()
            await loaded.host.stop()
