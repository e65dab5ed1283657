"""Answers in the shapes of OpenAI's API, whole and in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, Protocol

from baton.client import Chunk, Completion, Logprob, Model, TopLogprob, Usage
from baton.gateway.call_reader import Arguments, CallBegins, Content, Found, Reader

Json = dict[str, Any]
_LOWEST_LOGPROB = -9999.0
"""JSON has no -inf. Source: vLLM uses the same."""


@dataclass(frozen=True, slots=True)
class Head:
    """What all objects of one answer begin with."""

    answer_id: str
    created: int
    """Unix time in seconds."""
    model: str
    has_usage: bool = False
    """Chunks have a `usage`, null but in the last one."""

    def object(self, kind: str, choices: list[Json]) -> Json:
        """An object of an answer."""
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def chunk(self, kind: str, choices: list[Json]) -> Json:
        """An object of a streamed answer."""
        body = self.object(kind, choices)
        if self.has_usage:
            body["usage"] = None
        return body


class Renderer(Protocol):
    """One endpoint's shapes."""

    def opening(self, head: Head, index: int) -> list[Json]:
        """Chunks that open a choice."""

    def pieces(self, head: Head, index: int, chunk: Chunk) -> list[Json]:
        """Chunks for a piece of a choice."""

    def ending(self, head: Head, usage: Json) -> Json:
        """The chunk without choices that tells the usage."""

    def whole(self, head: Head, answers: Sequence[Completion], usage: Json) -> Json:
        """The answer as one object."""


class CompletionRenderer:
    """Shapes of /v1/completions; one per answer, because offsets run through a choice."""

    def __init__(self) -> None:
        self._offsets: dict[int, int] = {}

    def opening(self, head: Head, index: int) -> list[Json]:
        """See Renderer."""
        del head, index
        return []

    def pieces(self, head: Head, index: int, chunk: Chunk) -> list[Json]:
        """See Renderer."""
        if not (chunk.text or chunk.finish_reason or chunk.logprobs or chunk.token_ids):
            return []
        choice = self._choice(index, chunk)
        choice["text"] = chunk.text
        body = head.chunk("text_completion", [choice])
        return [_with_explanation(body, [chunk])]

    def ending(self, head: Head, usage: Json) -> Json:
        """See Renderer."""
        return {**head.object("text_completion", []), "usage": usage}

    def whole(self, head: Head, answers: Sequence[Completion], usage: Json) -> Json:
        """See Renderer."""
        choices = [
            {**self._choice(index, answer), "text": answer.text, **_prompt_logprobs(answer)}
            for index, answer in enumerate(answers)
        ]
        body = {**head.object("text_completion", choices), "usage": usage}
        return _with_explanation(body, answers)

    def _choice(self, index: int, part: Chunk | Completion) -> Json:
        return {
            "index": index,
            "text": "",
            "logprobs": self._logprobs(index, part.logprobs) if part.logprobs else None,
            "finish_reason": part.finish_reason or None,
            "stop_reason": part.stop_reason or None,
            **_token_ids(part),
        }

    def _logprobs(self, index: int, entries: Sequence[Logprob]) -> Json:
        offsets: list[int] = []
        offset = self._offsets.get(index, 0)
        for entry in entries:
            offsets.append(offset)
            offset += len(entry.token)
        self._offsets[index] = offset
        has_top = any(entry.top for entry in entries)
        return {
            "tokens": [_token_name(entry) for entry in entries],
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": (
                [{_token_name(top): _finite(top.logprob) for top in entry.top} for entry in entries]
                if has_top
                else None
            ),
            "text_offset": offsets,
        }


class ChatRenderer:
    """Shapes of /v1/chat/completions; one per answer, because each choice has a reader of its own.

    `make_reader` makes what finds tool calls; None where there cannot be any.
    """

    def __init__(self, make_reader: Callable[[], Reader] | None = None) -> None:
        self._make_reader = make_reader
        self._readers: dict[int, Reader] = {}
        self._num_calls: dict[int, int] = {}

    def opening(self, head: Head, index: int) -> list[Json]:
        """See Renderer."""
        return [self._chunk(head, index, {"role": "assistant", "content": ""})]

    def pieces(self, head: Head, index: int, chunk: Chunk) -> list[Json]:
        """See Renderer."""
        deltas = self._deltas(head, index, chunk)
        if (chunk.logprobs or chunk.token_ids) and not deltas:
            deltas = [{"content": ""}]
        bodies = [
            self._chunk(head, index, delta, None if number else chunk)
            for number, delta in enumerate(deltas)
        ]
        if chunk.finish_reason:
            last = self._chunk(head, index, {})
            last["choices"][0]["finish_reason"] = self._finish_reason(index, chunk)
            last["choices"][0]["stop_reason"] = chunk.stop_reason or None
            bodies.append(_with_explanation(last, [chunk]))
        return bodies

    def ending(self, head: Head, usage: Json) -> Json:
        """See Renderer."""
        return {**head.object("chat.completion.chunk", []), "usage": usage}

    def whole(self, head: Head, answers: Sequence[Completion], usage: Json) -> Json:
        """See Renderer."""
        choices = [
            {
                "index": index,
                "message": self._message(head, index, answer),
                "logprobs": _chat_logprobs(answer.logprobs),
                "finish_reason": self._finish_reason(index, answer),
                "stop_reason": answer.stop_reason or None,
                **_token_ids(answer),
            }
            for index, answer in enumerate(answers)
        ]
        body = {**head.object("chat.completion", choices), "usage": usage}
        body.update(_prompt_logprobs(answers[0]))
        return _with_explanation(body, answers)

    def _message(self, head: Head, index: int, answer: Completion) -> Json:
        message: Json = {"role": "assistant", "content": answer.text, "refusal": None}
        if self._make_reader is None:
            return message
        texts: list[str] = []
        calls: list[Json] = []
        for delta in self._deltas(head, index, answer):
            texts.append(delta.get("content", ""))
            for part in delta.get("tool_calls", ()):
                if "id" in part:
                    calls.append({key: part[key] for key in ("id", "type", "function")})
                else:
                    calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
        message["content"] = "".join(texts)
        if calls:
            message.update(content=message["content"] or None, tool_calls=calls)
        return message

    def _deltas(self, head: Head, index: int, part: Chunk | Completion) -> list[Json]:
        if self._make_reader is None:
            return [{"content": part.text}] if part.text else []
        if index not in self._readers:
            self._readers[index] = self._make_reader()
        reader = self._readers[index]
        found = reader.feed(part.text)
        if part.finish_reason:
            found += reader.finish()
        return [self._delta(head, index, entry) for entry in found]

    def _delta(self, head: Head, index: int, entry: Found) -> Json:
        match entry:
            case Content(text):
                return {"content": text}
            case CallBegins(call, name):
                self._num_calls[index] = call + 1
                function = {"name": name, "arguments": ""}
                call_id = _call_id(f"{head.answer_id}/{index}/{call}")
                whole = {"index": call, "id": call_id, "type": "function", "function": function}
                return {"tool_calls": [whole]}
            case Arguments(call, text):
                return {"tool_calls": [{"index": call, "function": {"arguments": text}}]}

    def _finish_reason(self, index: int, part: Chunk | Completion) -> str:
        has_calls = self._num_calls.get(index, 0) > 0
        return "tool_calls" if has_calls and part.finish_reason == "stop" else part.finish_reason

    def _chunk(self, head: Head, index: int, delta: Json, part: Chunk | None = None) -> Json:
        """`part` is what the tokens' own fields are taken from."""
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _chat_logprobs(part.logprobs) if part else None,
            "finish_reason": None,
            **(_token_ids(part) if part else {}),
        }
        return head.chunk("chat.completion.chunk", [choice])


def usage_json(usages: Sequence[Usage], outputs_per_prompt: int) -> Json:
    """What an answer used; a prompt with several outputs counts once."""
    prompts = usages[::outputs_per_prompt]
    prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    kept = {"response_cached": True} if all(usage.response_cached for usage in usages) else {}
    return {
        **kept,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": sum(usage.accepted_tokens for usage in usages),
            "rejected_prediction_tokens": sum(
                usage.draft_tokens - usage.accepted_tokens for usage in usages
            ),
        },
    }


def model_json(model: Model, created: int) -> Json:
    """An entry of /v1/models."""
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "baton",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len_tokens,
        "permission": [],
    }


def _token_ids(part: Chunk | Completion) -> Json:
    """The field of vLLM, where asked for."""
    return {"token_ids": list(part.token_ids)} if part.token_ids else {}


def _call_id(name: str) -> str:
    """Nine letters and digits: the templates of Mistral take no other."""
    return blake2b(name.encode(), digest_size=5).hexdigest()[:9]


def _chat_logprobs(entries: Sequence[Logprob]) -> Json | None:
    if not entries:
        return None
    content = [
        {**_chat_token(entry), "top_logprobs": [_chat_token(top) for top in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _chat_token(entry: Logprob | TopLogprob) -> Json:
    return {
        "token": entry.token,
        "logprob": _finite(entry.logprob),
        "bytes": list(entry.token_bytes),
    }


def _prompt_logprobs(answer: Completion) -> Json:
    """The field of vLLM, where asked for: per prompt token, null first, candidates by id."""
    if not answer.prompt_logprobs:
        return {}
    positions: list[Json | None] = [None]
    for entry in answer.prompt_logprobs:
        found = {str(entry.token_id): _candidate(entry, None)}
        for rank, top in enumerate(entry.top, start=1):
            found[str(top.token_id)] = _candidate(top, rank)
        positions.append(found)
    return {"prompt_logprobs": positions}


def _candidate(entry: Logprob | TopLogprob, rank: int | None) -> Json:
    return {"logprob": _finite(entry.logprob), "rank": rank, "decoded_token": entry.token}


def _token_name(entry: Logprob | TopLogprob) -> str:
    """A token that is no whole text by itself is named by its bytes, as OpenAI does."""
    if "\ufffd" not in entry.token:
        return entry.token
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.token_bytes)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)


def _with_explanation(body: Json, parts: Iterable[Chunk | Completion]) -> Json:
    """Adds what `explain` asked for, if anything came."""
    explained = [part for part in parts if part.stages or part.placement]
    if explained:
        body["baton"] = [
            {
                "trace_id": part.trace_id,
                "stages": [asdict(stage) for stage in part.stages],
                "placement": asdict(part.placement) if part.placement else None,
            }
            for part in explained
        ]
    return body
