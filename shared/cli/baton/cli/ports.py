"""Free ports on loopback, for processes that are about to start."""

from __future__ import annotations

import socket
from random import Random

LOOPBACK = "127.0.0.1"
_RANGE = (18000, 32000)
"""Below the range from which Linux takes ports for outgoing connections, so that none is taken
between the choice and the bind."""
_MAX_TRIES = 1000


def is_free(port: int) -> bool:
    """True when the port can be bound on loopback now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def is_listening(address: str) -> bool:
    """True when a process accepts connections at that port of loopback."""
    port = int(address.rpartition(":")[2])
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.2)
        return probe.connect_ex((LOOPBACK, port)) == 0


class PortChooser:
    """Hands out free ports, each once."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._chosen: set[int] = set()

    def choose(self) -> int:
        """A free port.

        Raises:
            OSError: none was found.
        """
        for _ in range(_MAX_TRIES):
            port = self._rng.randrange(*_RANGE)
            if port not in self._chosen and is_free(port):
                self._chosen.add(port)
                return port
        raise OSError(f"no free port found between {_RANGE[0]} and {_RANGE[1]}")
