"""Callers of tokenizers and workers, over shared channels."""

from __future__ import annotations

from baton.core.clock import Clock
from baton.core.cluster import Member
from baton.wire.channel import ChannelPool
from baton.wire.decode import DecodeCaller, RpcDecodeCaller
from baton.wire.prefill import PrefillCaller, RpcPrefillCaller
from baton.wire.tokenizer import RpcTokenizer, TokenizerCaller


class Peers:
    """Makes a caller for each use; the channels stay."""

    def __init__(self, channels: ChannelPool, clock: Clock) -> None:
        self._channels = channels
        self._clock = clock

    def tokenizer(self, address: str) -> TokenizerCaller:
        """The tokenizer at an address."""
        return RpcTokenizer(self._channels.get(address))

    def prefill(self, member: Member) -> PrefillCaller:
        """A prefill worker."""
        channel = self._channels.get(member.status.address)
        return RpcPrefillCaller(channel, f"prefill worker {member.worker_id}", self._clock)

    def decode(self, member: Member) -> DecodeCaller:
        """A decode worker."""
        channel = self._channels.get(member.status.address)
        return RpcDecodeCaller(channel, f"decode worker {member.worker_id}", self._clock)
