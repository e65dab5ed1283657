"""Selects a scheduler for each request, and owns the clients to them."""

from __future__ import annotations

import time
from itertools import count

from baton.client import AsyncClient, NoWorker, RetryPolicy, Tls
from baton.core.roles import Role
from baton.rpc.membership import MembershipView

MAX_CLIENTS = 16
"""Schedulers used at once; others replace those that disappear."""


class Schedulers:
    """Hands out clients, round robin over the usable schedulers."""

    def __init__(
        self,
        address: str,
        members: MembershipView,
        timeout_s: float,
        tls: Tls | None = None,
        key: str = "",
    ) -> None:
        self._address = address
        self._members = members
        self._timeout_s = timeout_s
        self._tls = tls
        self._key = key
        self._clients: dict[str, AsyncClient] = {}
        self._turns = count()

    async def client(self) -> AsyncClient:
        """A client to a scheduler; do not close it.

        Raises:
            NoWorker: none is known.
        """
        return await self._client_to(self._address or self._pick())

    async def clients(self) -> list[AsyncClient]:
        """Clients to all usable schedulers.

        Raises:
            NoWorker: none is known.
        """
        addresses = [self._address] if self._address else self._usable()
        return [await self._client_to(address) for address in addresses]

    async def _client_to(self, address: str) -> AsyncClient:
        client = self._clients.pop(address, None)
        if client is None:
            # No retries: the HTTP client gets a refusal with the delay after which to retry.
            client = AsyncClient(
                address,
                timeout_s=self._timeout_s,
                api_key=self._key,
                tls=self._tls,
                retry=RetryPolicy(max_attempts=1),
            )
        self._clients[address] = client
        while len(self._clients) > MAX_CLIENTS:
            await self._clients.pop(next(iter(self._clients))).close()
        return client

    async def close(self) -> None:
        """Closes all clients."""
        while self._clients:
            _, client = self._clients.popitem()
            await client.close()

    def _pick(self) -> str:
        usable = self._usable()
        return usable[next(self._turns) % len(usable)]

    def _usable(self) -> list[str]:
        usable = self._members.view().usable(Role.SCHEDULER, time.monotonic())
        if not usable:
            raise NoWorker("no scheduler is known yet; try again soon", retry_after_s=1.0)
        # At most as many as stay open, or each request would close a client in use.
        return [member.status.address for member in usable[:MAX_CLIENTS]]
