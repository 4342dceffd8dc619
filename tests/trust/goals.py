"""Every figure that the project holds itself to, with its goal; what a harness measures is found by its id.

The goals were set before anything was measured. "0 of N" leaves 3/N as the upper bound of the rate, at 95 %.
"""

from __future__ import annotations

from typing import NamedTuple


class Proof(NamedTuple):
    """Tests that measure a goal; see `tests.trust.proofs`.

    Attributes:
        tests: As pytest is told them.
        quick: Cases in `make test`; 1 where the tests count none, 0 where they belong to another tier.
        long: The same in `make test-long`.
        soak: The same in `make test-soak`.
    """

    tests: tuple[str, ...]
    quick: int = 0
    long: int = 0
    soak: int = 0


class Goal(NamedTuple):
    """A figure and its bound.

    Attributes:
        id: A group's letter and a number.
        name: What is counted.
        goal: The bound.
        proof: The tests that measure it, where no harness of this package does.
        within: Figures that measure it beside their own.
    """

    id: str
    name: str
    goal: str
    proof: Proof | None = None
    within: tuple[str, ...] = ()


GROUPS = {
    "A": "Robustness", "B": "Determinism and correctness", "C": "Overload, drain, lifecycle",
    "D": "Memory and resources", "E": "Artefacts", "F": "Hygiene",
}  # fmt: skip

_LIFE, _WORKER, _LOAD, _ERRORS = (f"tests/test_server_{name}.py::" for name in ("life", "worker", "load", "errors"))
_SWAPS = (_LIFE + "test_a_bundle_is_swapped_while_requests_run_and_a_damaged_one_is_refused[many]",)
_WIRE = ("tests/test_server_clients.py::test_the_wire_is_the_document[many]",)
_POISON = (_WORKER + "test_neighbours_are_right_in_a_thousand_batches",)
_OVERLOAD = Proof(("tests/test_server_overload.py",), long=60)

GOALS = (
    Goal("A1", "fuzzed texts that crash, hang, give non-finite values or a wrong shape", "0 of 1,000,000"),
    Goal("A2", "fuzzed HTTP requests: unexpected 5xx, other errors than JSON, dead server", "0 of 200,000",
         Proof(_WIRE, long=200, soak=10_000)),
    Goal("A3", "fuzzed bytes of six readers: crashes", "0 of 10,000,000 each"),
    Goal("A4", "every Unicode scalar in six contexts equal to transformers' tokenizer", "6,672,384 of 6,672,384",
         Proof(("tests/test_unicode.py::test_the_ids_of_every_character_are_transformers_ids",), soak=1)),
    Goal("A5", "one text of 10 MB, eight kinds", "<= 50 ms, <= 64 MB",
         Proof(("tests/test_cut.py::test_ten_megabytes",), quick=1)),
    Goal("A6", "neighbours of a failing text that get the right vector", "100 % of 10,000 batches",
         Proof(_POISON, long=1000, soak=10_000)),
    Goal("A7", "worker lost: not ready, in-flight resolved, recovered", "<= 1 s, <= 2 s, <= 5 s",
         Proof((_WORKER + "test_what_a_lost_worker_costs",), long=5)),
    Goal("A8", "NaN, infinity or null sent with 200", "0", Proof(_POISON, long=1000, soak=10_000)),
    Goal("B1", "distinct byte patterns of one batch repeated, per number of threads", "1"),
    Goal("B2", "FP32: difference by neighbours, order and padding", "<= 1e-6 over 100,000"),
    Goal("B3", "INT8: the same", "<= 1e-6 over 100,000"),
    Goal("B4", "FP16 on a GPU: the same", "<= 2e-3, cosine >= 0.99999"),
    Goal("B5", "FP32 against float64", "<= 2e-6, cosine >= 0.999999, over 50,000"),
    Goal("B6", "INT8 and FP16 against the reference on real texts", ">= 0.98 and mean >= 0.997; >= 0.9999",
         Proof(("tests/test_accuracy.py::test_a_trained_model_loses_little",), long=1)),
    Goal("B7", "INT8 on processors with and without VNNI; saturating builds found", "<= 0.3 points; 100 %",
         Proof(("tests/test_processors.py::test_an_emulated_processor_without_vnni",
                "tests/test_accuracy.py::test_weights_of_seven_bits_rank_as_those_of_eight"), soak=1)),
    Goal("B8", "bundles of the neighbouring versions", "equal or refused",
         Proof(("tests/test_manifest.py::test_another_format_version_is_refused",), quick=1)),
    Goal("B9", "hostile weights: neither finite vectors nor an error of ours", "0"),
    Goal("C1", "accepted and lost at twice the capacity", "0", _OVERLOAD),
    Goal("C2", "goodput at 2 and 5 times the capacity", ">= 0.95, >= 0.90", _OVERLOAD),
    Goal("C3", "p99 of accepted requests at twice the capacity", "<= budget + 2 batches", _OVERLOAD),
    Goal("C4", "p99 of saying 429 at 2 and 5 times the capacity", "<= 10 ms, <= 25 ms", _OVERLOAD),
    Goal("C5", "memory in tenfold overload with 2 MB bodies", "<= 256 MB"),
    Goal("C6", "recovery after overload", "<= 2 s"),
    Goal("C7", "work done for clients that had left", "<= 1 %",
         Proof((_LOAD + "test_the_texts_of_clients_that_leave_are_not_run[many]",), long=1000, soak=10_000)),
    Goal("C8", "expired requests run", "0",
         Proof(("tests/test_token_queue.py::test_expired_jobs_are_never_taken",), quick=1000)),
    Goal("C9", "accepted requests failed by SIGTERM", "0 of 200 runs",
         Proof((_LIFE + "test_no_accepted_request_fails_in_fifty_ends",), long=50, soak=200)),
    Goal("C10", "ready before the golden texts were right", "0 of 200 starts"),
    Goal("C11", "p99 of /health/live under load", "<= 20 ms"),
    Goal("C12", "failed or mixed answers while bundles are swapped", "0 of 1,000 swaps",
         Proof(_SWAPS, long=50, soak=1000)),
    Goal("C13", "slow senders: p99 of the others; cut by the deadline", "<= +10 %; 100 %",
         Proof((_LOAD + "test_five_hundred_dribbling_connections_do_not_move_the_others",), long=1)),
    Goal("D1", "service: growth over 1,000,000 requests", "<= 8 MB",
         Proof((_LOAD + "test_memory_after_many_requests[many]",), long=200_000, soak=1_000_000)),
    Goal("D2", "resident memory after 100,000 lengths against 1,000", "<= +5 %"),
    Goal("D3", "descriptors and threads after a soak", "0", within=("D1b", "D4")),
    Goal("D4", "growth over 10,000 encoders opened and dropped", "<= 8 MB"),
    Goal("D5", "metrics series after 100,000 random paths", "0 more",
         Proof((_ERRORS + "test_metrics_exist_from_the_start_and_stay_as_many",), quick=30, soak=100_000)),
    Goal("D6", "limits of memory without a right answer or a clean error", "0"),
    Goal("D7", "forks with an open encoder that hang or crash", "0 of 1,000"),
    Goal("D8", "64 threads on one encoder: answers unlike serial ones", "0 of 640,000"),
    Goal("E1", "exports killed at every system call on files, and at 200 random moments", "old or new: 100 %"),
    Goal("E2", "ENOSPC and EIO at every such call", "target untouched: 100 %"),
    Goal("E3", "bundles with a flipped byte, cut, missing or extra files", "100 % refused, file named"),
    Goal("E4", "hostile checkpoints and bundles, at least 40", "100 % refused, no canary touched"),
    Goal("E5", "two exports of one input", "byte-identical"),
    Goal("E6", "share of hashing in a cold load", "<= 10 %"),
    Goal("E7", "loads during swaps that mix bundles", "0 of 10,000"),
    Goal("F1", "clients' texts in logs, metrics, errors", "0",
         Proof((_ERRORS + "test_no_text_comes_back_or_into_the_log",), quick=1)),
    Goal("F2", "routes without a key", "health and the page only",
         Proof(("tests/test_server_settings.py::test_keys",), quick=1)),
    Goal("F3", "runtime dependencies; audit; locked hashes", "<= 4; clean; all"),
    Goal("F4", "sockets, processes, written files by importing and encoding", "0"),
    Goal("F5", "keys compared otherwise than in constant time", "0"),
    Goal("F6", "answers that differ from the OpenAPI document", "0", Proof(_WIRE, long=200, soak=10_000)),
    Goal("F7", "negative controls caught", "all"),
)  # fmt: skip
