"""Calls a server with Triton's own client: `python -m tests.support.triton_caller HOST:PORT`.

A process of its own, because that client's stubs and Baton's declare the same messages.
"""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
from tritonclient import grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException


def text_input(text: str) -> Any:
    tensor = triton.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    return tensor


def max_tokens_input(number: int) -> Any:
    tensor = triton.InferInput("max_tokens", [1], "INT32")
    tensor.set_data_from_numpy(np.array([number], dtype=np.int32))
    return tensor


def text_of(result: Any) -> str:
    values = result.as_numpy("text_output")
    return "" if values is None else values[0].decode()


def infer(client: Any) -> dict[str, Any]:
    parameters = {"max_tokens": 8, "temperature": 0.0, "seed": 3}
    outputs = [triton.InferRequestedOutput(name) for name in ("text_output", "output_ids")]
    result = client.infer(
        "demo", [text_input("hello")], outputs=outputs, parameters=parameters, request_id="mine"
    )
    response = result.get_response()
    return {
        "text": text_of(result),
        "ids": result.as_numpy("output_ids").tolist(),
        "id": response.id,
        "finish_reason": response.parameters["finish_reason"].string_param,
        "prompt_tokens": response.parameters["prompt_tokens"].int64_param,
    }


def refused(client: Any, **parameters: Any) -> list[str]:
    try:
        client.infer("demo", [text_input("hello")], parameters=parameters)
    except InferenceServerException as error:
        return [error.status(), error.message()]
    return []


def stream(client: Any) -> dict[str, Any]:
    """Two streams and a request that fails, in one call."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    for name, prompt, tokens in (("a", "hello", 8), ("b", "other", 5), ("c", "wrong", 9999)):
        client.async_stream_infer(
            "demo",
            [text_input(prompt), max_tokens_input(tokens)],
            request_id=name,
            parameters={"stream": True, "temperature": 0.0},
            enable_empty_final_response=name == "a",
        )
    texts: dict[str, list[str]] = {"a": [], "b": []}
    errors: list[str] = []
    num_open = 3
    while num_open:
        result, error = answers.get(timeout=20)
        if error is not None:
            errors.append(error.message())
            num_open -= 1
            continue
        response = result.get_response()
        texts[response.id].append(text_of(result))
        num_open -= response.parameters["triton_final_response"].bool_param
    client.stop_stream()
    return {"texts": texts, "errors": errors}


def contract() -> dict[str, Any]:
    """Field numbers and types of the protocol's messages, as this client has them."""
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    return {
        "methods": {m.name: [m.input_type.name, m.output_type.name] for m in service.methods},
        "messages": {
            message.name: fields(message)
            for message in service_pb2.DESCRIPTOR.message_types_by_name.values()
        },
    }


def fields(message: Any) -> dict[str, Any]:
    return {
        "fields": {field.name: [field.number, field.type] for field in message.fields},
        "nested": {nested.name: fields(nested) for nested in message.nested_types},
    }


def main() -> None:
    client = triton.InferenceServerClient(sys.argv[1])
    metadata = client.get_model_metadata("demo")
    report = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": [client.is_model_ready("demo"), client.is_model_ready("other")],
        "server": client.get_server_metadata().name,
        "inputs": [entry.name for entry in metadata.inputs],
        "infer": infer(client),
        "refused": [refused(client, max_tokens=0), refused(client, unheard_of=1)],
        "stream": stream(client),
        "contract": contract(),
    }
    client.close()
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
