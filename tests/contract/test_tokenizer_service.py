"""TokenizerService over gRPC, through the services' own interceptor."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio

from baton.core.errors import InvalidRequest, ModelNotFound
from baton.rpc.interceptors import ServerInterceptor
from baton.rpc.metrics import Metrics
from baton.rpc.telemetry import Telemetry
from baton.tokenizer.settings import TokenizerSettings
from baton.tokenizer.tokenizer import LocalTokenizer
from baton.tokenizer.vocabulary import Vocabularies, Vocabulary
from baton.v1 import common_pb2, inference_pb2, tokenizer_pb2, tokenizer_pb2_grpc
from baton.wire.clock import SystemClock
from baton.wire.errors import error_from_rpc
from baton.wire.tokenizer import add_tokenizer
from tests.support import tiny_tokenizer
from tests.support.eventually import eventually

LIMITS = TokenizerSettings(
    max_text_chars=50_000, max_token_ids=1_000, max_chat_messages=3, max_open_outputs=2
)
Ask = tokenizer_pb2.StreamTextRequest
Open = tokenizer_pb2.OpenTextStream


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    return Vocabulary("tiny", tiny_tokenizer.byte_level(tmp_path_factory.mktemp("tiny")))


@pytest_asyncio.fixture
async def service(vocabulary) -> AsyncIterator[Any]:
    async with serving(vocabulary) as stub:
        yield stub


@asynccontextmanager
async def serving(vocabulary: Vocabulary) -> AsyncIterator[Any]:
    metrics = Metrics("tokenizer", "t1", "0")
    telemetry = Telemetry("tokenizer", "t1")
    executor = ThreadPoolExecutor(1)
    servicer = LocalTokenizer(Vocabularies([vocabulary]), LIMITS, executor, metrics)
    server = grpc.aio.server(interceptors=[ServerInterceptor(telemetry, metrics, SystemClock())])
    assert add_tokenizer(server, servicer) == "baton.v1.TokenizerService"
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        stub.open_outputs = lambda: metrics.registry.get_sample_value(
            "baton_tokenizer_open_outputs"
        )
        yield stub
    await server.stop(0)
    executor.shutdown()
    telemetry.shutdown()


def chat(*messages: tuple[str, str]) -> inference_pb2.ChatPrompt:
    return inference_pb2.ChatPrompt(
        messages=[inference_pb2.ChatMessage(role=role, content=text) for role, text in messages]
    )


async def test_encode_text_and_chat(service, vocabulary):
    answer = await service.Encode(tokenizer_pb2.EncodeRequest(text="hello world"), timeout=5)
    assert list(answer.token_ids) == vocabulary.encode_text("hello world")
    assert (answer.model, answer.tokenizer_hash) == ("tiny", vocabulary.tokenizer_hash)
    request = tokenizer_pb2.EncodeRequest(model="tiny", chat=chat(("user", "hello")))
    answer = await service.Encode(request, timeout=5)
    assert list(answer.token_ids) == vocabulary.encode_chat([{"role": "user", "content": "hello"}])


TOOL_TEMPLATE = (
    "{% if tools %}{{ tools[0]['function']['name'] }};{% endif %}"
    "{% for message in messages %}{{ message.keys() | list | tojson }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments.a }}){% endfor %}"
    "{{ message.tool_call_id }}{{ message.content }};{% endfor %}"
)


async def test_templates_see_tools_their_calls_and_their_answers(tmp_path):
    directory = tiny_tokenizer.byte_level(tmp_path, chat_template=TOOL_TEMPLATE)
    calls = [{"id": "1", "function": {"name": "f", "arguments": '{"a": "x"}'}}]
    prompt = chat(("assistant", ""), ("tool", "42"))
    prompt.tools_json = json.dumps([{"type": "function", "function": {"name": "f"}}])
    prompt.messages[0].tool_calls_json = json.dumps(calls)
    prompt.messages[1].tool_call_id = "1"
    async with serving(Vocabulary("tiny", directory)) as service:
        answer = await service.Encode(tokenizer_pb2.EncodeRequest(chat=prompt), timeout=5)
        decode = tokenizer_pb2.DecodeTextRequest(token_ids=answer.token_ids)
        text = (await service.DecodeText(decode, timeout=5)).text
    assert text == (
        'f;["role", "content", "tool_calls"]f(x);["role", "content", "tool_call_id"]142;'
    )


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("tools_json", "{", "tools is not JSON"),
        ("tools_json", "[" * 20_000, "tools is not JSON"),
        ("tools_json", "{}", "array"),
        ("tool_calls_json", "[1]", "function with a name"),
        ("tool_calls_json", '[{"function": {"name": "f", "arguments": "{"}}]', "not JSON"),
        ("tools_json", "[" + "1," * 25_000 + "1]", "at most 50000"),
    ],
)
async def test_bad_tools_are_refused(service, field, text, message):
    prompt = chat(("assistant", ""))
    setattr(prompt if field == "tools_json" else prompt.messages[0], field, text)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.Encode(tokenizer_pb2.EncodeRequest(chat=prompt), timeout=5)
    assert message in error_from_rpc(caught.value).message


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (tokenizer_pb2.EncodeRequest(), InvalidRequest, "text or chat"),
        (tokenizer_pb2.EncodeRequest(model="x", text="a"), ModelNotFound, "tiny"),
        (tokenizer_pb2.EncodeRequest(text="x" * 50_001), InvalidRequest, "at most 50000"),
        (tokenizer_pb2.EncodeRequest(chat=chat()), InvalidRequest, "1 to 3 messages"),
        (tokenizer_pb2.EncodeRequest(chat=chat(*[("user", "")] * 4)), InvalidRequest, "got 4"),
        (tokenizer_pb2.EncodeRequest(chat=chat(("wizard", ""))), InvalidRequest, "unknown role"),
    ],
)
async def test_bad_texts_are_refused_with_a_reason(service, request_, error, message):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.Encode(request_, timeout=5)
    mapped = error_from_rpc(caught.value)
    assert type(mapped) is error
    assert message in mapped.message


async def test_long_texts_do_not_hold_up_short_ones(service):
    long = asyncio.create_task(_encode(service, "hello " * 8_000))
    for _ in range(5):
        await _encode(service, "hello")
    assert len((await long).token_ids) >= 8_000


async def test_decode_text(service, vocabulary):
    ids = [*vocabulary.encode_text("wörld"), 0]
    request = tokenizer_pb2.DecodeTextRequest(token_ids=ids)
    assert (await service.DecodeText(request, timeout=5)).text == "wörld"
    request.keep_special_tokens = True
    assert (await service.DecodeText(request, timeout=5)).text == "wörld<|endoftext|>"
    for bad in ([999], [1] * 1_001):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.DecodeText(tokenizer_pb2.DecodeTextRequest(token_ids=bad), timeout=5)
        assert type(error_from_rpc(caught.value)) is InvalidRequest


async def test_one_call_serves_many_outputs_in_order(service, vocabulary):
    smile = vocabulary.encode_text("😀😃")
    stop = vocabulary.encode_text("a STOP b")
    call = service.StreamText(timeout=10)
    asks = [
        Ask(stream_id=1, open=Open(), token_ids=smile[:1]),
        Ask(stream_id=2, open=Open(model="tiny", stop=["STOP"]), token_ids=stop),
        Ask(stream_id=1, token_ids=smile[1:], describe_token_ids=[smile[0], 0]),
        Ask(stream_id=2, token_ids=stop),
        Ask(stream_id=1, flush=True),
        Ask(stream_id=1, open=Open(), token_ids=smile, flush=True),
    ]
    answers = [await _ask(call, ask) for ask in asks]
    assert [answer.stream_id for answer in answers] == [1, 2, 1, 2, 1, 1]
    assert answers[0].text + answers[2].text + answers[4].text == "😀😃"
    assert (answers[1].text, answers[1].stop) == ("a ", "STOP")
    assert 0 < answers[1].num_tokens < len(stop)
    assert (answers[3].text, answers[3].num_tokens) == ("", 0)
    assert answers[5].text == "😀😃"
    described = answers[2].token_texts
    assert described[0].token_bytes == vocabulary.token_bytes(smile[0])
    assert described[1].text == "<|endoftext|>"
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_error_of_one_output_leaves_the_others_alone(service, vocabulary):
    ids = vocabulary.encode_text("hello")
    call = service.StreamText(timeout=10)
    await _ask(call, Ask(stream_id=1, open=Open()))
    reasons = [
        (await _ask(call, ask)).error_reason
        for ask in (
            Ask(stream_id=2, open=Open(model="other")),
            Ask(stream_id=2, open=Open(stop=[""])),
            Ask(stream_id=2, open=Open()),
            Ask(stream_id=3, open=Open()),
            Ask(stream_id=2, token_ids=[1] * 1_001),
        )
    ]
    assert reasons == [
        common_pb2.ERROR_REASON_MODEL_NOT_FOUND,
        common_pb2.ERROR_REASON_INVALID_REQUEST,
        common_pb2.ERROR_REASON_UNSPECIFIED,
        common_pb2.ERROR_REASON_QUEUE_FULL,
        common_pb2.ERROR_REASON_INVALID_REQUEST,
    ]
    assert (await _ask(call, Ask(stream_id=1, token_ids=ids))).text == "hello"
    call.cancel()


async def test_ending_the_call_forgets_its_outputs(service):
    call = service.StreamText(timeout=10)
    await _ask(call, Ask(stream_id=1, open=Open()))
    await _ask(call, Ask(stream_id=2, open=Open()))
    assert service.open_outputs() == 2
    call.cancel()
    await eventually(lambda: service.open_outputs() == 0)


async def test_info(service, vocabulary):
    answer = await service.GetTokenizerInfo(tokenizer_pb2.GetTokenizerInfoRequest(), timeout=5)
    [info] = answer.tokenizers
    assert (info.model, info.vocab_size, list(info.eos_token_ids)) == ("tiny", 312, [0])
    assert info.has_chat_template


async def _encode(service: Any, text: str) -> tokenizer_pb2.EncodeResponse:
    return await service.Encode(tokenizer_pb2.EncodeRequest(text=text), timeout=10)


async def _ask(call: Any, ask: tokenizer_pb2.StreamTextRequest) -> Any:
    await call.write(ask)
    return await call.read()
