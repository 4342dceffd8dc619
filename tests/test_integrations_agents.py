"""semantic-kernel and guidance, which M3E's README names, in an environment of their own: their pins are others'."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

import m3e
from m3e import Encoder

pytestmark = [pytest.mark.frameworks, pytest.mark.checkout, pytest.mark.timeout(290)]
ENVIRONMENT = Path(__file__).parents[1] / ".venv-agents"

SENTENCE_TRANSFORMERS = """
import asyncio, sys
import m3e.sentence_transformers
sys.modules["sentence_transformers"] = m3e.sentence_transformers
from semantic_kernel.connectors.ai.hugging_face import HuggingFaceTextEmbedding
service = HuggingFaceTextEmbedding(ai_model_id=sys.argv[1])
vectors = asyncio.run(service.generate_embeddings(TEXTS))
"""
# The answer of OpenAI's protocol, base64 as its client asks for by default.
OPENAI = """
import asyncio, base64, http.server, json, sys, threading
from openai import AsyncOpenAI
from semantic_kernel.connectors.ai.open_ai import OpenAITextEmbedding
from m3e import Encoder
encoder = Encoder(sys.argv[1])

class Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/embeddings", self.path
        found = encoder.encode(asked["input"], normalize_embeddings=True).astype("<f4")
        base = asked.get("encoding_format") == "base64"
        data = [{"object": "embedding", "index": i,
                 "embedding": base64.b64encode(v.tobytes()).decode() if base else v.tolist()}
                for i, v in enumerate(found)]
        body = json.dumps({"object": "list", "model": "m3e", "data": data,
                           "usage": {"prompt_tokens": 1, "total_tokens": 1}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = AsyncOpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none")
service = OpenAITextEmbedding(ai_model_id="m3e", async_client=client)
vectors = asyncio.run(service.generate_embeddings(TEXTS))
"""
COMPARE = """
import numpy as np
from m3e import Encoder
expected = Encoder(sys.argv[1]).encode(TEXTS, normalize_embeddings=True)
np.testing.assert_allclose(np.asarray(vectors), expected, atol=1e-6)
print("same", np.asarray(vectors).shape)
"""
GUIDANCE = """
import sys
import guidance
from m3e.sentence_transformers import SentenceTransformer

notes = ["Open an issue to report a bug.", "Passwords are reset on the account page.", "It rains in spring."]
model = SentenceTransformer(sys.argv[1])
vectors = model.encode(notes, normalize_embeddings=True)

@guidance
def answer(lm, question):
    best = notes[int((vectors @ model.encode(question, normalize_embeddings=True)).argmax())]
    lm += f"Context: {best}\\nQuestion: {question}\\nAnswer: "
    return lm + guidance.select(["the account page", "an issue", "spring"], name="answer")

told = f"Context: {notes[1]}\\nQuestion: I forgot my password\\nAnswer: the account page"
lm = guidance.models.Mock(b"<s>" + told.encode())
print((lm + answer("I forgot my password"))["answer"])
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """The environment sees this one's packages behind its own."""
    if not (ENVIRONMENT / "complete").exists():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        (folder,) = ENVIRONMENT.glob("lib/python3*/site-packages")
        behind = [str(Path(m3e.__file__).parents[1]), *(entry for entry in sys.path if entry.endswith("site-packages"))]
        (folder / "behind.pth").write_text("\n".join(behind) + "\n")
        install = [str(ENVIRONMENT / "bin/pip"), "install", "-q", "semantic-kernel>=1.30", "guidance>=0.2"]
        subprocess.run(install, check=True, capture_output=True)
        (ENVIRONMENT / "complete").touch()
    return ENVIRONMENT / "bin" / "python"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (SENTENCE_TRANSFORMERS + COMPARE, "same (3, 384)"),
        (OPENAI + COMPARE, "same (3, 384)"),
        (GUIDANCE, "the account page"),
    ],
    ids=["semantic-kernel-class", "semantic-kernel-openai", "guidance"],
)
def test_a_program(python: Path, minilm_encoder: Encoder, program: str, expected: str) -> None:
    texts = 'TEXTS = ["今天天气真好", "How are you?", ""]\n'
    command = [str(python), "-W", "ignore", "-c", texts + program, str(minilm_encoder._folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected
