"""Too little memory: a right answer, or an error that says so; never a wrong vector or a hang.

A child limits its own address space to so much more than it has, then opens a bundle and encodes. It prints its
vectors' hash, or the error; the parent looks at that and at how it ended.

Some libraries end the process themselves when memory is short, and nothing in Python can hold them back. Rust's
allocator, in tokenizers, aborts with ``memory allocation of N bytes failed``; glibc exits where not even the few bytes
are left that a thread needs for its own variables. onnxruntime's kernels allocate on threads that catch nothing, where
C++ aborts, and what they free after a failure was sometimes never set, which ends in an abort or a fault
(1.32: ``free(5)``). Two of its threads may end the process at once, which C++ calls recursive; then the second cuts
short what the fault handler says, and no other library here throws ``std::bad_alloc`` on threads. m3e has no native
code of its own. These outcomes are counted apart, and only where the child's last words, Python's fault handler among
them, show that library at work. numpy's OpenBLAS exits while numpy is imported, so the limit begins behind that.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections import Counter

from tests.trust import Figure, Outcome, counted
from tests.trust.models import tiny_bundle

_TIMEOUT_S = 600
_MEGABYTE = 1 << 20
_MOST_MEGABYTES = 240  # plenty

_PROGRAM = """
import hashlib, re, resource, sys
bundle, more, stage, mistake = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]

def limit():
    used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))

import numpy
if stage == "import": limit()
try:
    from m3e import Encoder
    import onnxruntime
    if stage == "open": limit()
    encoder = Encoder(bundle, num_threads=2)
    if stage == "encode": limit()
    vectors = encoder.encode(["今天天气真好", "a", "长" * 600, *(["word " * 300] * 40)])
except Exception as error:
    kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ in ("builtins", "m3e.errors"))
    if mistake == "crash":
        import os; os.abort()
    if mistake == "zeros":
        print("vectors", "0"); sys.exit(0)
    print("error", kind, repr(str(error))[:300]); sys.exit(1)
print("vectors", hashlib.sha256(vectors.tobytes()).hexdigest())
"""
_CLEAN = ("M3EError", "StartError", "InferenceError", "BundleError", "MemoryError", "DependencyError", "ImportError",
          "OSError")  # fmt: skip
# How a library ends the process by itself: exit statuses, and what is said then.
_RUNS = r'(?s)Fatal Python error: .*File "[^"]*/onnxruntime/capi/onnxruntime_inference_collection\.py", line \d+ in '
_TWICE = r"what\(\):\s+std::bad_alloc\s+terminate called recursively"
_ENDS = {
    "abort in tokenizers": ({-signal.SIGABRT}, r"memory allocation of \d+ bytes failed"),
    "end in onnxruntime": ({-signal.SIGABRT, -signal.SIGSEGV}, _RUNS + r"(run|_create_inference_session)\b|" + _TWICE),
    "exit of glibc": ({127}, "cannot allocate memory for thread-local data: ABORT"),
}
STAGES = ("import", "open", "encode")


def attempt(stage: str, more: int, mistake: str = "") -> tuple[str, str]:
    """Encode with so many bytes more than a stage has; no limit for an empty stage.

    Returns:
        The vectors' hash, ``error``, or what else it was; and what the child said.
    """
    python = [sys.executable, "-Xfaulthandler", "-Wignore", "-c", _PROGRAM]
    command = [*python, str(tiny_bundle()), str(more), stage, mistake]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return "hang", ""
    said = (done.stdout + done.stderr).strip()[-300:]
    if done.returncode == 0 and (found := re.fullmatch(r"vectors (\w+)", done.stdout.strip())):
        return found[1], said
    if done.returncode == 1 and re.match(rf"error ({'|'.join(_CLEAN)}) ", done.stdout):
        return "error", said
    for name, (statuses, words) in _ENDS.items():
        if done.returncode in statuses and re.search(words, done.stderr):
            return name, said
    return f"exit status {done.returncode}", said


def measure(count: int) -> Outcome:
    """Limits of many sizes at each stage."""
    right, said = attempt("", 0)
    assert re.fullmatch(r"[0-9a-f]{64}", right), said
    outcomes: Counter[str] = Counter()
    others = []
    for i in counted(count):
        # The golden ratio spreads any number of sizes evenly.
        more = int(i // len(STAGES) * 0.618034 % 1 * _MOST_MEGABYTES * _MEGABYTE)
        outcome, said = attempt(STAGES[i % len(STAGES)], more)
        outcomes[outcome] += 1
        if outcome not in (right, "error", *_ENDS):
            others.append(f"{STAGES[i % len(STAGES)]} with {more >> 20} MB more: {outcome}, {said}")
    caught = {}
    for mistake in ("crash", "zeros"):
        outcome, _ = attempt("open", _MEGABYTE, mistake)
        caught[mistake] = outcome not in (right, "error", *_ENDS)
    return Outcome(
        f"{len(others)} of {count} (right {outcomes[right]}, clean errors {outcomes['error']}, "
        f"libraries' own ends {sum(outcomes[name] for name in _ENDS)})" + (f"; first: {others[0]}" if others else ""),
        not others,
        caught,
    )


FIGURES = (
    Figure(
        "D6", "limits of memory with another outcome than a right answer, a clean error or the libraries' own end", "0",
        measure, quick=4, long=40, soak=150,
    ),
)  # fmt: skip
