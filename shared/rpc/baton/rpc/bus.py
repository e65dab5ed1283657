"""Small events over NATS: at most once, in order per publisher, never in the way of a request.

The bus connects in the background and keeps at it for ever: every connection is a new NATS client,
and each takes over all subscriptions, so a broker that was killed and started again (without any
state) is found again. While there is no connection, publishing drops and counts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable
from random import Random

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import SlowConsumerError
from opentelemetry import trace
from opentelemetry.trace import SpanKind

from baton.core.clock import Clock
from baton.rpc.logs import log_failure
from baton.rpc.metrics import Metrics
from baton.rpc.tasks import Tasks
from baton.rpc.telemetry import Telemetry

logger = logging.getLogger(__name__)

Handler = Callable[[str, bytes], Awaitable[None]]
"""Called with a message's subject and data, one message of a subscription at a time."""
_CONNECT_TIMEOUT_S = 3.0
_PUBLISH_TIMEOUT_S = 1.0
_DRAIN_TIMEOUT_S = 2
_LOST_CHECK_S = 0.25
_MIN_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 2.0
_PING_INTERVAL_S = 3
_MAX_PENDING_MSGS = 65_536
_MAX_PENDING_BYTES = 32 * 1024 * 1024
_CREDENTIALS = re.compile(r"//[^/@]*@")


class Bus:
    """One process's link to NATS. With an empty url there is none, and nothing is ever delivered.

    Not thread-safe: use it on its event loop only.
    """

    def __init__(
        self, url: str, name: str, telemetry: Telemetry, metrics: Metrics, rng: Random, clock: Clock
    ) -> None:
        self._urls = [part.strip() for part in url.split(",") if part.strip()]
        self._name = name
        self._telemetry = telemetry
        self._rng = rng
        self._clock = clock
        self._client: Client | None = None
        self._handlers: list[tuple[str, Handler]] = []
        self._on_connect: list[Callable[[], Awaitable[None]]] = []
        self._tasks = Tasks("bus")
        self._dropped = metrics.counter(
            "bus_dropped_messages", "Messages lost while sending or receiving", ("direction",)
        )
        for direction in ("publish", "receive"):
            self._dropped.labels(direction)
        self._connects = metrics.counter("bus_connects", "Connections made to the bus")

    @property
    def is_connected(self) -> bool:
        """True while messages can be sent and received."""
        return self._client is not None and self._client.is_connected

    def start(self, on_failure: Callable[[], None] | None = None) -> None:
        """Begins to connect, in the background; returns at once.

        `on_failure` is called when the background task ends unexpectedly.
        """
        self._tasks.on_failure = on_failure
        if self._urls and not len(self._tasks):
            self._tasks.spawn(self._keep_connected(), "connect")

    def on_connect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Has `callback` awaited after every connect, when the subscriptions are in place."""
        self._on_connect.append(callback)

    async def subscribe(self, subject: str, handler: Handler) -> None:
        """Has `handler` awaited for each message, on this and all later connections.

        A message whose handler raises is logged and passed over.
        """
        self._handlers.append((subject, handler))
        if self._client is not None:
            try:
                await self._attach(self._client, subject, handler)
            except (NatsError, OSError):
                logger.debug("bus subscribe failed; it is made again on the next connection")

    async def publish(self, subject: str, data: bytes) -> None:
        """Sends a message if there is a connection; drops and counts it otherwise. Never raises."""
        client = self._client
        if client is None or not client.is_connected:
            if self._urls:
                self._dropped.labels("publish").inc()
            return
        try:
            async with self._clock.timeout(_PUBLISH_TIMEOUT_S):
                await client.publish(subject, data, headers=self._publish_headers(subject))
        except (NatsError, OSError, ValueError):
            self._dropped.labels("publish").inc()

    async def flush(self) -> None:
        """Waits until the broker has what was published, for a second at most. Never raises."""
        if self._client is not None:
            try:
                await self._client.flush(timeout=1)
            except (NatsError, OSError):
                logger.debug("bus flush failed")

    async def close(self) -> None:
        """Sends what is pending, ends all subscriptions, and disconnects."""
        await self._tasks.stop()

    async def _keep_connected(self) -> None:
        backoff_s = _MIN_BACKOFF_S
        is_told = False
        while True:
            client = Client()
            try:
                await self._connect(client)
                backoff_s, is_told = _MIN_BACKOFF_S, False
                await self._until_lost(client)
                logger.warning("bus lost; connecting again")
            except (NatsError, OSError, ValueError, AttributeError) as error:
                # nats-py raises the last two at a peer that is not quite a NATS server.
                if not is_told:
                    url = ",".join(_CREDENTIALS.sub("//", url) for url in self._urls)
                    logger.warning(
                        "bus not reachable; trying on", extra={"url": url, "error": repr(error)}
                    )
                    is_told = True
                await self._clock.sleep(backoff_s * (0.5 + self._rng.random()))
                backoff_s = min(_MAX_BACKOFF_S, backoff_s * 2)
            finally:
                self._client = None
                await self._shut(client)

    async def _connect(self, client: Client) -> None:
        async with self._clock.timeout(_CONNECT_TIMEOUT_S):
            await client.connect(
                self._urls,
                name=self._name,
                # Its own reconnecting would buffer stale announcements and can give up. The two
                # numbers make a refused connect fail at once instead of after two minutes.
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=_MIN_BACKOFF_S,  # type: ignore[arg-type]
                connect_timeout=2,
                ping_interval=_PING_INTERVAL_S,
                max_outstanding_pings=2,
                drain_timeout=_DRAIN_TIMEOUT_S,
                error_cb=self._on_error,
            )
            num_attached = 0
            while num_attached < len(self._handlers):  # more may come while this one waits
                for subject, handler in self._handlers[num_attached:]:
                    await self._attach(client, subject, handler)
                    num_attached += 1
                await client.flush(timeout=2)
        self._client = client
        self._connects.inc()
        logger.info("bus connected")
        for callback in self._on_connect:
            await callback()

    async def _attach(self, client: Client, subject: str, handler: Handler) -> None:
        async def deliver(message: Msg) -> None:
            await self._deliver(message, handler)

        await client.subscribe(
            subject,
            cb=deliver,
            pending_msgs_limit=_MAX_PENDING_MSGS,
            pending_bytes_limit=_MAX_PENDING_BYTES,
        )

    async def _deliver(self, message: Msg, handler: Handler) -> None:
        headers = message.headers or {}
        context = self._telemetry.extract(headers)
        span = None
        if "traceparent" in headers:
            span = self._telemetry.start_span(
                f"process {_template(message.subject)}",
                parent=context,
                kind=SpanKind.CONSUMER,
                attributes=_attributes(message.subject),
            )
            context = self._telemetry.context_of(span)
        # Set for every message, also for those without a trace: the task is the subscription's.
        self._telemetry.set_current(context)
        try:
            await handler(message.subject, message.data)
        except Exception as error:  # noqa: BLE001 - one bad message must not end a subscription
            self._dropped.labels("receive").inc()
            log_failure(logger, "bus handler failed", error, subject=_template(message.subject))
        finally:
            if span is not None:
                span.end()

    def _publish_headers(self, subject: str) -> dict[str, str] | None:
        """Headers that carry the current trace on; None outside of any."""
        if not trace.get_current_span().get_span_context().is_valid:
            return None
        span = self._telemetry.start_span(
            f"publish {_template(subject)}", kind=SpanKind.PRODUCER, attributes=_attributes(subject)
        )
        span.end()
        return self._telemetry.inject(self._telemetry.context_of(span))

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, SlowConsumerError):
            self._dropped.labels("receive").inc()
        logger.debug("bus error", extra={"error": repr(error)})

    async def _until_lost(self, client: Client) -> None:
        # Looked at, not waited for: nats-py's callbacks may be lost when a read task ends itself.
        while client.is_connected:
            await self._clock.sleep(_LOST_CHECK_S)

    async def _shut(self, client: Client) -> None:
        try:
            async with self._clock.timeout(_DRAIN_TIMEOUT_S + 1):
                if client.is_connected:
                    await client.drain()
                if not client.is_closed:
                    await client.close()
        except (NatsError, OSError) as error:
            logger.debug("bus close failed", extra={"error": repr(error)})


def _template(subject: str) -> str:
    """The subject without its ids: span names must be few."""
    return ".".join(subject.split(".")[:2])


def _attributes(subject: str) -> dict[str, str]:
    return {
        "messaging.system": "nats",
        "messaging.destination.template": _template(subject),
        "messaging.destination.name": subject,
    }
