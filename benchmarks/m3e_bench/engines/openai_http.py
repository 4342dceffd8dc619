"""Any server that speaks OpenAI's /v1/embeddings, asked over HTTP."""

from __future__ import annotations

import base64
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np


class Engine:
    """Requests of 32 texts, eight at a time, each thread on a connection that stays open.

    Args:
        url: Up to and with ``/v1``.
        model: What to name the model in requests.
        key_variable: Environment variable with the API key.
    """

    PACKAGES = ("numpy",)
    IN_PROCESS = False
    CONCURRENT_REQUESTS = 32

    @staticmethod
    def prepare(checkpoint: Path, folder: Path, calibration: list[str], **options: Any) -> None:
        """Nothing to convert: the server has its model."""

    def __init__(
        self, checkpoint: Path, folder: Path, threads: int, url: str, model: str = "m3e", key_variable: str = ""
    ) -> None:
        self._url = urlsplit(url.rstrip("/") + "/embeddings")
        self._model = model
        self._headers = {"Content-Type": "application/json"}
        if key_variable:
            self._headers["Authorization"] = f"Bearer {os.environ[key_variable]}"
        self._local = threading.local()
        self._connections: list[HTTPConnection] = []
        self._pool = ThreadPoolExecutor(8)

    def encode(self, texts: list[str]) -> Any:
        """Embed texts."""
        batches = [texts[i : i + 32] for i in range(0, len(texts), 32)]
        rows = map(self._request, batches) if len(batches) == 1 else self._pool.map(self._request, batches)
        return np.concatenate(list(rows))

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown()
        for connection in self._connections:
            connection.close()

    def _request(self, texts: list[str]) -> Any:
        body = json.dumps({"model": self._model, "input": texts, "encoding_format": "base64"})
        connection = self._connection()
        connection.request("POST", self._url.path, body.encode(), self._headers)
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise RuntimeError(f"{self._url.geturl()} answered {response.status}: {content[:300]!r}")
        data = sorted(json.loads(content)["data"], key=lambda item: item["index"])
        return np.stack([_vector(item["embedding"]) for item in data])

    def _connection(self) -> HTTPConnection:
        if not hasattr(self._local, "connection"):
            kind = HTTPSConnection if self._url.scheme == "https" else HTTPConnection
            self._local.connection = kind(self._url.netloc, timeout=120)
            self._connections.append(self._local.connection)
        connection: HTTPConnection = self._local.connection
        return connection


def _vector(embedding: str | list[float]) -> Any:
    """Base64 of float32, little-endian, or a list, whichever the server chose."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), dtype="<f4")
    return np.asarray(embedding, dtype=np.float32)
