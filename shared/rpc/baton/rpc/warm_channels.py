"""Channels that are connected before a request needs them, and closed when their member is gone."""

from __future__ import annotations

from baton.core.cluster import ClusterView
from baton.core.roles import Role
from baton.wire.channel import ChannelPool


class WarmChannels:
    """Follows the members of some roles; give `on_members` to `MembershipView.on_change`."""

    def __init__(
        self, channels: ChannelPool, roles: frozenset[Role], *, is_bulk: bool = False
    ) -> None:
        self._channels = channels
        self._roles = roles
        self._is_bulk = is_bulk
        self._addresses: set[str] = set()

    def on_members(self, view: ClusterView) -> None:
        """Connects to members that joined; closes the channels of those that are gone."""
        members = [member.status for member in view]
        for address in self._addresses - {status.address for status in members}:
            self._channels.discard(address)
        self._addresses = {each.address for each in members if each.role in self._roles}
        for address in self._addresses:
            self._channels.warm(address, is_bulk=self._is_bulk)
