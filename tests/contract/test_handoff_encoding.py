"""KV that is rounded for its way to the other worker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from baton.cache.service import CacheService
from baton.cache.settings import CacheSettings
from baton.core.errors import ErrorReason
from baton.core.handoff.frames import KvEncoding, Span
from baton.core.sampling import SamplingParams
from baton.core.sequence import SequenceSpec
from baton.v1 import decode_pb2, kv_transfer_pb2
from baton.wire.channel import ChannelPool
from baton.wire.frames import encode_frame
from baton.wire.layout import fingerprint_to_pb
from tests.support.eventually import eventually
from tests.support.tiny_models import load_reference, reference_greedy
from tests.support.workers import Pair, hosted, prompt_of, refused, worker_pair


async def test_kv_may_be_rounded_on_its_way(model_path: Path) -> None:
    prompt = prompt_of(100)
    async with (
        hosted(CacheSettings(nats_url=""), CacheService) as cache,
        worker_pair(
            model_path, prefill={"kv_encoding": "int8"}, cache_address=cache.address
        ) as pair,
    ):
        exact = list(reference_greedy(load_reference(model_path), prompt, 8))
        out = await pair.generate(prompt)
        # The first token is computed from exact KV, and the rest is likely, not sure, to be equal.
        assert out.token_ids[0] == exact[0]
        assert len(out.token_ids) == 8
        layout = pair.decode.engine.fingerprint.layout
        assert out.done.bytes == 7 * KvEncoding.INT8.layout(layout).block_bytes
        assert out.done.bytes < 7 * layout.block_bytes / 3
        sent = pair.prefill.engine.transfer.read_blocks
        received = pair.decode.engine.transfer.export_blocks(
            pair.decode.engine.block_hashes(SequenceSpec("", tuple(prompt), SamplingParams(), 1))
        )
        mine = np.frombuffer(sent("req/1", Span(0, layout.num_layers, 0, 1)), np.float32)
        theirs = np.frombuffer(received[0][1], np.float32)
        assert not np.array_equal(mine, theirs)
        assert np.abs(mine - theirs).max() <= np.abs(mine).max() / 250
        # What is not exact is not spread: the store gets the prompt's blocks of the sender only.
        await eventually(lambda: cache.service.snapshot().stats["stored_blocks"] == 6)
        await pair.assert_clean()
        assert pair.decode.service.snapshot().stats["stored_blocks"] == 0


@pytest.mark.parametrize("fault", ["corrupt_chunk=0", "drop_chunk=0"])
async def test_rounded_kv_is_checked_as_it_travels(model_path: Path, fault: str) -> None:
    prompt = prompt_of(150)
    faulty = {"fault": f"{fault},times=1", "kv_encoding": "int8"}
    async with worker_pair(model_path, prefill=faulty) as pair:
        grant = await pair.reserve(prompt)
        request = pair.prefill_request(prompt, grant)
        await refused(ErrorReason.KV_CHECKSUM, pair.run_prefill(request))
        assert len((await pair.generate(prompt, attempt=2)).token_ids) == 8
        await pair.assert_clean()


async def test_rounded_kv_may_be_refused(model_path: Path) -> None:
    prompt = prompt_of(40)
    async with worker_pair(
        model_path, prefill={"kv_encoding": "int8"}, decode={"take_int8_kv": False}
    ) as pair:
        grant = await pair.reserve(prompt)
        request = pair.prefill_request(prompt, grant)
        message = await refused(ErrorReason.KV_LAYOUT_MISMATCH, pair.run_prefill(request))
        assert message == "KV encoded as INT8 is not taken here"
        # Nothing was written: the reservation is still good.
        out = await pair.run_decode(grant, local_prefill=True)
        assert out.token_ids == list(reference_greedy(load_reference(model_path), prompt, 8))


async def test_an_unknown_encoding_is_refused(pair: Pair) -> None:
    grant = await pair.reserve(prompt_of(40))
    opening = kv_transfer_pb2.PushHeader(
        epoch=grant.epoch,
        open=kv_transfer_pb2.PushOpen(
            reservation_id=grant.reservation_id,
            request_id="req",
            attempt=1,
            fingerprint=fingerprint_to_pb(pair.prefill.engine.fingerprint),
        ),
    ).SerializeToString()
    # Field 8 of PushOpen with a value from the future, merged into the frame's `open`.
    later = opening + bytes((0x0A, 2, 0x40, 99))
    channels = ChannelPool(max_message_bytes=4 << 20)
    call = channels.get(pair.decode.address).stream_stream(
        "/baton.v1.KvTransferService/Push",
        request_serializer=None,
        response_deserializer=kv_transfer_pb2.PushResponse.FromString,
    )(timeout=5)
    await call.write(encode_frame(later, b""))
    answer = await call.read()
    assert answer.failed.reason == ErrorReason.KV_LAYOUT_MISMATCH.value
    assert answer.failed.message == "KV encoding 99 is not known here"
    call.cancel()
    await channels.close()
    await pair.to_decode.Release(decode_pb2.ReleaseRequest(request_id="req"), timeout=5)
