"""The commands against a scheduler that says three words."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from typer.testing import CliRunner

from baton.cli.main import app
from baton.client import Client, InvalidRequest, QueueFull
from tests.support.fake_inference import FakeInference, serve

TIMEOUT_S = 40


@dataclass
class Fake:
    """A fake scheduler on a thread of its own, and commands that talk to it."""

    inference: FakeInference
    address: str

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "baton.cli.main", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "BATON_ADDRESS": self.address, "COLUMNS": "110"},
        )

    def __call__(self, *arguments: str, text: str = "") -> tuple[int, str, str]:
        with self.start(*arguments) as command:
            out, err = command.communicate(text, timeout=TIMEOUT_S)
            return command.returncode, out, err


@pytest.fixture
def fake() -> Iterator[Fake]:
    inference = FakeInference()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server, address = asyncio.run_coroutine_threadsafe(serve(inference), loop).result(10)
    try:
        yield Fake(inference, address)
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_generate_sends_every_option(fake: Fake) -> None:
    status, out, _ = fake(
        *("generate", "-", "--top-k", "5", "--top-p", "0.9", "--min-p", "0.1", "--seed", "3"),
        *("--stop", "a", "--stop", "b", "--choice", "yes", "--choice", "no", "--no-speculation"),
        text="from standard input",
    )
    assert (status, out) == (0, "Hello wörld!\n")
    request = fake.inference.requests[0]
    sampling = request.sampling
    assert request.text == "from standard input"
    assert (sampling.top_k, round(sampling.top_p, 3), round(sampling.min_p, 3)) == (5, 0.9, 0.1)
    assert (list(sampling.stop), sampling.seed) == (["a", "b"], 3)
    assert list(sampling.guide.choice.texts) == ["yes", "no"]
    assert sampling.HasField("speculation")
    assert not sampling.speculation


def test_chat_keeps_its_history_until_reset_and_survives_a_failure(fake: Fake) -> None:
    lines = ["/help", "one", "/stats", "two", "/reset", "three", "/quit"]
    status, out, _ = fake("chat", "--system", "Be brief.", text="\n".join(lines) + "\n")
    assert status == 0
    assert "forget the conversation" in out
    assert "prefill" in out, "/stats shows stages"
    told = [[m.content for m in r.chat.messages] for r in fake.inference.requests]
    answer = "Hello wörld!"
    assert told == [
        ["Be brief.", "one"],
        ["Be brief.", "one", answer, "two"],
        ["Be brief.", "three"],
    ]
    fake.inference.requests.clear()
    fake.inference.before = [InvalidRequest("no chat template here")]
    status, out, _ = fake("chat", text="one\ntwo\n")
    assert status == 0
    assert "no chat template here" in out
    assert [len(r.chat.messages) for r in fake.inference.requests] == [1, 1]


def test_chat_refuses_a_model_without_a_template_at_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_client: Client, **_: object) -> list[int]:
        raise InvalidRequest("the model has no chat template")

    monkeypatch.setattr(Client, "tokenize", refuse)
    result = CliRunner().invoke(app, ["chat", "--address", "127.0.0.1:1"], input="one\n")
    assert result.exit_code == 1
    assert "the model has no chat template" in result.output
    assert "/help" not in result.output


def test_json_holds_the_token_ids(fake: Fake) -> None:
    status, out, _ = fake("generate", "x", "--json")
    assert status == 0
    assert len(json.loads(out)["token_ids"]) == json.loads(out)["usage"]["completion_tokens"] > 0


def test_ctrl_c_stops_the_answer_and_not_the_chat(fake: Fake) -> None:
    fake.inference.hold = asyncio.Event()
    with fake.start("chat") as command:
        assert command.stdin is not None
        assert command.stdout is not None
        command.stdin.write("one\n")
        command.stdin.flush()
        seen = ""
        while "Hello" not in seen:
            seen += command.stdout.read(1)
        command.send_signal(signal.SIGINT)
        out, _ = command.communicate("/quit\n", timeout=TIMEOUT_S)
        assert command.returncode == 0
    assert "…" in out
    assert fake.inference.num_cancelled == 1


def figures(text: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return document


def test_bench_keeps_so_many_requests_running(fake: Fake) -> None:
    arguments = ("--requests", "9", "-c", "3", "--max-tokens", "7", "--json")
    status, out, _ = fake("bench", *arguments)
    document = figures(out)
    assert status == 0
    assert document["requests"] == {"ok": 9, "failed": {}, "skipped": 0}
    assert document["output_tokens_per_s"] > 0
    assert {"p50", "p90", "p95", "p99", "mean", "max"} <= set(document["ttft_ms"])
    sampling = fake.inference.requests[0].sampling
    assert (sampling.max_tokens, sampling.ignore_eos, sampling.temperature) == (7, True, 0.0)
    texts = [request.text for request in fake.inference.requests]
    assert len(set(texts)) == len(texts), "no two prompts share a prefix"


def test_bench_sends_at_a_rate_and_ends_in_time(fake: Fake) -> None:
    arguments = ("--rate", "50", "--requests", "1000", "--duration-s", "0.5", "--json")
    status, out, _ = fake("bench", *arguments)
    document = figures(out)
    assert status == 0
    assert 3 < document["requests"]["ok"] < 200
    assert "Poisson" in document["load"]


def test_bench_says_what_failed_and_prints_a_table(fake: Fake) -> None:
    fake.inference.after = [QueueFull("full")] * 2
    status, out, _ = fake("bench", "--requests", "4", "-c", "1")
    assert status == 0
    assert "2 queue_full" in out
    assert "goodput" in out
    assert "TTFT, ms" in out


def test_the_first_ctrl_c_ends_a_bench_with_its_figures(fake: Fake) -> None:
    with fake.start("bench", "--requests", "1000000", "--json") as command:
        while len(fake.inference.requests) < 5:
            assert command.poll() is None
        command.send_signal(signal.SIGINT)
        out, _ = command.communicate(timeout=TIMEOUT_S)
        assert command.returncode == 0
    assert figures(out)["requests"]["ok"] >= 4


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_what_the_shell_runs(fake: Fake, shell: str) -> None:
    status, out, _ = fake("completion", shell)
    assert status == 0
    assert f"complete_{shell}" in out
    assert "_BATON_COMPLETE" in out


def test_completion_knows_the_commands() -> None:
    env = {"_BATON_COMPLETE": "complete_bash", "COMP_WORDS": "baton be", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, [], prog_name="baton", env=env)
    assert result.output.split() == ["bench"]


def test_errors_say_what_to_do(fake: Fake) -> None:
    fake.inference.before = [QueueFull("64 requests wait")]
    status, _, err = fake("generate", "x")
    assert status in {0, 1}  # the SDK tries again
    status, _, err = fake("generate", "x", "--regex", "a", "--choice", "b")
    assert status == 2
    assert "only one of" in err
    status, _, err = fake("generate", "x", "--address", "127.0.0.1:1", "--timeout-s", "1")
    assert status == 1
    assert "baton status" in err or "raise --timeout-s" in err
