"""/v1/chat/completions: its request body, and its answers in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from baton.client import Chunk, Completion, InvalidRequest, Logprob, TopLogprob
from baton.core.toolcalls.parser import (
    AnswerParser,
    AnswerText,
    ParsedPart,
    ToolCallArguments,
    ToolCallStart,
)
from baton.core.toolcalls.tools import ToolUse
from baton.gateway.answer_format import (
    AnswerHeader,
    Json,
    finite,
    prompt_logprobs_json,
    token_ids_json,
    with_explanation,
)
from baton.gateway.chat_messages import Message, messages_for_sdk
from baton.gateway.sampling_body import ChoiceRequest, SamplingBody


class ToolFunction(BaseModel):
    """`tools[].function`; fields that are not listed here are for the chat template."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """An entry of `tools`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["function"]
    function: ToolFunction


class ChosenFunction(BaseModel):
    """`tool_choice.function`."""

    name: str


class ChosenTool(BaseModel):
    """`tool_choice` that names a tool."""

    type: Literal["function"]
    function: ChosenFunction


class ChatBody(SamplingBody):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    add_generation_prompt: Literal[True] | None = None
    add_special_tokens: Literal[False] | None = None

    def tool_use(self) -> ToolUse:
        """Which tools the answer may or must call.

        Raises:
            InvalidRequest: see ToolUse.of.
        """
        tools = [tool.model_dump(exclude_unset=True) for tool in self.tools or ()]
        is_parallel = self.parallel_tool_calls is not False
        if isinstance(self.tool_choice, ChosenTool):
            name = self.tool_choice.function.name
            return ToolUse.of(tools, forced_name=name, is_parallel=is_parallel)
        return ToolUse.of(tools, choice=self.tool_choice or "auto", is_parallel=is_parallel)

    def choices(self, max_choices: int) -> list[ChoiceRequest]:
        """The `n` choices of the answer.

        Raises:
            InvalidRequest: there are too many choices, or a field is not supported.
        """
        self.check_num_choices(1, max_choices)
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true")
        options = self.shared_options()
        options["messages"] = messages_for_sdk(self.messages)
        tool_use = self.tool_use()
        options["tools"] = [dict(tool) for tool in tool_use.tools]
        call_guide = tool_use.guide()
        if call_guide is not None and options["guide"] is not None:
            raise InvalidRequest("tool_choice demands a call: leave out what the text must match")
        options["guide"] = call_guide or options["guide"]
        limit = self.max_completion_tokens
        options["max_tokens"] = self.max_tokens if limit is None else limit
        options["logprobs"] = bool(self.logprobs)
        options["top_logprobs"] = self.top_logprobs
        return self.choices_of(None, options)


class ChatFormat:
    """Implements AnswerFormat for one answer.

    `make_parser` makes the tool-call parser of each choice; None if the answer cannot hold calls.
    """

    chunk_kind = "chat.completion.chunk"

    def __init__(
        self, header: AnswerHeader, make_parser: Callable[[], AnswerParser] | None = None
    ) -> None:
        self.header = header
        self._make_parser = make_parser
        self._parsers: dict[int, AnswerParser] = {}
        self._num_calls: dict[int, int] = {}

    def opening(self, index: int) -> list[Json]:
        """See AnswerFormat."""
        return [self._chunk(index, {"role": "assistant", "content": ""})]

    def pieces(self, index: int, chunk: Chunk) -> list[Json]:
        """See AnswerFormat."""
        deltas = self._deltas(index, chunk)
        if (chunk.logprobs or chunk.token_ids) and not deltas:
            deltas = [{"content": ""}]
        bodies = [
            self._chunk(index, delta, None if number else chunk)
            for number, delta in enumerate(deltas)
        ]
        if chunk.finish_reason:
            last = self._chunk(index, {})
            last["choices"][0]["finish_reason"] = self._finish_reason(index, chunk)
            last["choices"][0]["stop_reason"] = chunk.stop_reason or None
            bodies.append(with_explanation(last, [chunk]))
        return bodies

    def whole(self, answers: Sequence[Completion], usage: Json) -> Json:
        """See AnswerFormat."""
        choices = [
            {
                "index": index,
                "message": self._message(index, answer),
                "logprobs": _logprobs_json(answer.logprobs),
                "finish_reason": self._finish_reason(index, answer),
                "stop_reason": answer.stop_reason or None,
                **token_ids_json(answer),
            }
            for index, answer in enumerate(answers)
        ]
        body = {**self.header.object("chat.completion", choices), "usage": usage}
        body.update(prompt_logprobs_json(answers[0]))
        return with_explanation(body, answers)

    def _message(self, index: int, answer: Completion) -> Json:
        message: Json = {"role": "assistant", "content": answer.text, "refusal": None}
        if self._make_parser is None:
            return message
        texts: list[str] = []
        calls: list[Json] = []
        for part in self._parse(index, answer):
            match part:
                case AnswerText(text):
                    texts.append(text)
                case ToolCallStart(call, name):
                    calls.append(self._call(index, call, name))
                case ToolCallArguments(call, text):
                    calls[call]["function"]["arguments"] += text
        message["content"] = "".join(texts)
        if calls:
            message.update(content=message["content"] or None, tool_calls=calls)
        return message

    def _deltas(self, index: int, chunk: Chunk) -> list[Json]:
        if self._make_parser is None:
            return [{"content": chunk.text}] if chunk.text else []
        return [self._delta(index, part) for part in self._parse(index, chunk)]

    def _delta(self, index: int, part: ParsedPart) -> Json:
        match part:
            case AnswerText(text):
                return {"content": text}
            case ToolCallStart(call, name):
                return {"tool_calls": [{"index": call, **self._call(index, call, name)}]}
            case ToolCallArguments(call, text):
                return {"tool_calls": [{"index": call, "function": {"arguments": text}}]}

    def _parse(self, index: int, part: Chunk | Completion) -> list[ParsedPart]:
        if self._make_parser is None:
            return []
        if index not in self._parsers:
            self._parsers[index] = self._make_parser()
        parser = self._parsers[index]
        parts = parser.feed(part.text)
        return parts + parser.finish() if part.finish_reason else parts

    def _call(self, index: int, call: int, name: str) -> Json:
        self._num_calls[index] = call + 1
        seed = f"{self.header.answer_id}/{index}/{call}".encode()
        # Nine letters and digits: Mistral's templates accept nothing else.
        call_id = blake2b(seed, digest_size=5).hexdigest()[:9]
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}

    def _finish_reason(self, index: int, part: Chunk | Completion) -> str:
        has_calls = self._num_calls.get(index, 0) > 0
        return "tool_calls" if has_calls and part.finish_reason == "stop" else part.finish_reason

    def _chunk(self, index: int, delta: Json, source: Chunk | None = None) -> Json:
        """A chunk with `delta`; `source` provides its log-probabilities and token ids."""
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs_json(source.logprobs) if source else None,
            "finish_reason": None,
            **(token_ids_json(source) if source else {}),
        }
        return self.header.chunk(self.chunk_kind, [choice])


def _logprobs_json(entries: Sequence[Logprob]) -> Json | None:
    if not entries:
        return None
    content = [
        {**_token_json(entry), "top_logprobs": [_token_json(top) for top in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _token_json(entry: Logprob | TopLogprob) -> Json:
    return {
        "token": entry.token,
        "logprob": finite(entry.logprob),
        "bytes": list(entry.token_bytes),
    }
