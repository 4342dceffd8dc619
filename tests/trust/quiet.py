"""Importing and encoding opens no socket, starts no process and writes no file.

A child installs an audit hook before anything is imported. Native code does not pass by Python's hook, so the child
also forbids the kernel to write files at all (RLIMIT_FSIZE 0: a write to a file ends it), and looks for sockets among
its descriptors at the end. With seccomp nothing of this would be needed, and the harness would run on one system only.
"""

from __future__ import annotations

import json
import subprocess
import sys

from tests.trust import Figure, Outcome, counted
from tests.trust.models import tiny_bundle

_TIMEOUT_S = 300

_PROGRAM = r"""
import json, os, resource, signal, sys
sys.dont_write_bytecode = True
bundle, mistake = sys.argv[1:]
# Of https://docs.python.org/3/library/audit_events.html: network, processes, changes of the file system. numpy sets an
# environment variable while it is imported and takes it back; so the environment is compared as a whole.
WATCHED = (
    "socket.", "ssl.", "urllib.", "http.", "ftplib.", "smtplib.", "subprocess.", "os.system", "os.exec", "os.fork",
    "os.posix_spawn", "os.spawn", "os.startfile", "pty.", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link",
    "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr",
    "shutil.", "tempfile.", "sqlite3.", "webbrowser.", "signal.",
)
events = []

def hook(event, arguments):
    if event == "open":
        _, mode, flags = arguments
        written = isinstance(mode, str) and set(mode) & set("wax+")
        if written or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            events.append(f"open {arguments[0]} {mode} {flags}")
    elif event.startswith(WATCHED):
        events.append(f"{event} {arguments}"[:200])

sys.addaudithook(hook)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and a native write would only fail
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
environment = dict(os.environ)
from m3e import Encoder
encoder = Encoder(bundle)
encoder.encode(["今天天气真好", "a", "长" * 600, *["词"] * 100], normalize_embeddings=True, show_progress_bar=True)
list(encoder.encode_iter(["a", "b"]))
encoder.tokenize(["a"]), encoder.count_tokens(["a"]), encoder.similarity([[1.0]], [[2.0]]), repr(encoder)
if mistake == "a socket":
    import socket; socket.socket()
if mistake == "a process":
    import subprocess; subprocess.run(["true"])
if mistake == "a file":
    open("/dev/shm/m3e-trust-written", "a").close(); os.remove("/dev/shm/m3e-trust-written")
if mistake == "a file, by native code":
    import ctypes
    libc = ctypes.CDLL(None)
    libc.write(libc.open(b"/dev/shm/m3e-trust-written", 0o101, 0o600), b"x", 1)
if mistake == "a socket, by native code":
    import ctypes; ctypes.CDLL(None).socket(1, 1, 0)
if mistake == "an environment variable":
    os.environ["TOKENIZERS_PARALLELISM"] = "0"
for fd in os.listdir("/proc/self/fd"):
    try:
        if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
            events.append(f"descriptor {fd} is a socket")
    except OSError:
        pass  # the listing's own
if dict(os.environ) != environment:
    events.append("the environment changed")
print(json.dumps(events))
"""
_MISTAKES = ("a socket", "a process", "a file", "a file, by native code", "a socket, by native code",
             "an environment variable")  # fmt: skip


def events(mistake: str = "") -> list[str]:
    """What a child did that it should not."""
    command = [sys.executable, "-W", "ignore", "-c", _PROGRAM, str(tiny_bundle()), mistake]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode < 0:
        return [f"ended by signal {-done.returncode}"]
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


def measure(count: int) -> Outcome:
    """Import, open, encode in every way."""
    found = [event for _ in counted(count) for event in events()]
    caught = {mistake: bool(events(mistake)) for mistake in _MISTAKES}
    return Outcome(f"{len(found)} events" + (f"; first: {found[0]}" if found else ""), not found, caught)


FIGURES = (
    Figure("F4", "sockets, processes, written files and changed settings by importing and encoding", "0", measure, 1),
)  # fmt: skip
