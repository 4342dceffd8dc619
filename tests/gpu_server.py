"""The server with a card that is not there; run by the tests, known to nothing else.

With ``worker`` as its first argument it is the inference process.
"""

from __future__ import annotations

import pytest

from m3e.server import worker
from tests import own_worker
from tests.gpu_standin import put_in_place


def be_worker(arguments: list[str]) -> None:
    """Run inference on the card."""
    put_in_place(pytest.MonkeyPatch())
    worker.main(arguments=arguments)


if __name__ == "__main__":
    raise SystemExit(own_worker.serve(__file__, be_worker))
