"""Prometheus metrics of one process, in a separate registry, served over HTTP by a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from platform import python_version
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

RPC_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 60)
_DELAY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_PREFIX = "baton_"


class Metrics:
    """Makes metrics named `baton_…` and serves them. Labels must be bounded: never a request id."""

    def __init__(self, role: str, worker_id: str, version: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._server: WSGIServer | None = None
        self.gauge(
            "build_info",
            "1, with what is running as labels",
            ("version", "role", "worker_id", "python"),
        ).labels(version, role, worker_id, python_version()).set(1)
        self.rpc_duration_s = self.histogram(
            "rpc_server_call_duration_seconds",
            "Time from a call's arrival to its end",
            ("rpc_method", "status"),
            RPC_BUCKETS_S,
        )
        self.rpc_inflight = self.gauge("rpc_server_inflight", "Calls being served", ("rpc_method",))
        self.event_loop_delay_s = self.histogram(
            "event_loop_delay_seconds",
            "How late the event loop ran a timer",
            buckets=_DELAY_BUCKETS_S,
        )

    def counter(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Counter:
        """A counter `baton_<name>`; Prometheus shows it with the suffix `_total`."""
        return Counter(_PREFIX + name, help_text, labels, registry=self.registry)

    def gauge(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Gauge:
        """A gauge `baton_<name>`."""
        return Gauge(_PREFIX + name, help_text, labels, registry=self.registry)

    def histogram(
        self,
        name: str,
        help_text: str,
        labels: Sequence[str] = (),
        buckets: Sequence[float] = RPC_BUCKETS_S,
    ) -> Histogram:
        """A histogram `baton_<name>`."""
        return Histogram(_PREFIX + name, help_text, labels, registry=self.registry, buckets=buckets)

    def gauge_at_scrape(
        self, name: str, help_text: str, label: str, read: Callable[[], Mapping[str, float]]
    ) -> None:
        """A gauge `baton_<name>{label}` whose values `read` returns at each scrape, by label value.

        With no label, `read` returns one value under the key "".
        It is called on the HTTP server's threads.
        """
        self.registry.register(_AtScrape(_PREFIX + name, help_text, label, read))

    def counter_at_scrape(
        self, name: str, help_text: str, label: str, read: Callable[[], Mapping[str, float]]
    ) -> None:
        """A counter `baton_<name>{label}`, read as in `gauge_at_scrape`."""
        self.registry.register(
            _AtScrape(_PREFIX + name, help_text, label, read, CounterMetricFamily)
        )

    def serve(self, host: str, port: int) -> int:
        """Serves http://host:port/metrics from a thread; returns the port, chosen if it was 0.

        Raises:
            OSError: the address is taken or not this host's.
        """
        try:
            self._server, _ = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise OSError(f"metrics cannot listen on {host}:{port}: {error}") from error
        return int(self._server.server_port)

    def close(self) -> None:
        """Stops serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _AtScrape(Collector):
    def __init__(
        self,
        name: str,
        help_text: str,
        label: str,
        read: Callable[[], Mapping[str, float]],
        family: type[GaugeMetricFamily | CounterMetricFamily] = GaugeMetricFamily,
    ) -> None:
        self._name = name
        self._help_text = help_text
        self._labels = [label] if label else []
        self._read = read
        self._family = family

    def describe(self) -> Iterable[Metric]:
        """The family without values, so that registering does not call `read`."""
        return [self._family(self._name, self._help_text, labels=self._labels)]

    def collect(self) -> Iterable[Metric]:
        """The family with the values of now."""
        family = self._family(self._name, self._help_text, labels=self._labels)
        for key, value in self._read().items():
            family.add_metric([key] if self._labels else [], value)
        return [family]
