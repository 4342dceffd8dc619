"""The small service that every stack is measured with, on the stack that the service itself is built on."""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
import urllib.request
from pathlib import Path

import pytest

from benchmarks.stack_apps import ROW, answer
from benchmarks.stacks import serving

if sys.platform != "linux":
    pytest.skip("processes are bound to a processor by taskset", allow_module_level=True)

HERE = Path(sys.executable), min(os.sched_getaffinity(0))


def test_a_stack_answers_and_is_gone_afterwards() -> None:
    python, processor = HERE
    body = json.dumps({"input": "天气"}).encode()
    with serving(python, "uvicorn, httptools, uvloop", processor) as port:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/embeddings", body)
        with urllib.request.urlopen(request, timeout=10) as reply:
            content = reply.read()
    assert content == answer(body)
    assert base64.b64decode(json.loads(content)["data"][0]["embedding"]) == ROW
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_stack_that_does_not_answer_is_named() -> None:
    python, processor = HERE
    with pytest.raises(SystemExit, match="none such does not answer"), serving(python, "none such", processor):
        pytest.fail("it serves")
