"""What comes with the package: few dependencies, each locked by hash, none with a known vulnerability.

``python -m tests.trust.supply`` is what ``make audit`` runs: it checks the lock, writes an SBOM (CycloneDX) to
``build/sbom.json`` and asks the vulnerability services. It ends with 1 for a finding and with 2 where no service could
be asked: that is said, and never passes as clean.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.trust import Figure, Outcome

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "deploy" / "requirements.lock"
SBOM = ROOT / "build" / "sbom.json"
EXTRAS = ("cpu", "server")
_MOST_DEPENDENCIES = 4
_SERVICES = ("osv", "pypi")
# Jinja2 of 2010 has had vulnerabilities for as long as there are advisories.
_VULNERABLE = "jinja2==2.4.1"


def required(extras: tuple[str, ...] = EXTRAS) -> list[Requirement]:
    """What pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def problems(lock: str) -> list[str]:
    """What is wrong with the text of a lock: hashes, versions, what is missing."""
    found, pinned = [], {}
    for entry in re.split(r"\n(?=\S)", re.sub(r"(?m)^\s*#.*\n", "", lock).strip()):
        match = re.match(r"([\w.-]+)==(\S+)", entry)
        if match is None:
            found.append(f"no exact version: {entry[:60]}")
            continue
        pinned[canonicalize_name(match[1])] = match[2]
        if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry):
            found.append(f"{match[1]} has no hash")
    todo, seen = required(), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if name not in pinned:
            found.append(f"{name} is not locked")
        elif not requirement.specifier.contains(pinned[name], prereleases=True):
            found.append(f"{name} {pinned[name]} is locked, {requirement.specifier} is asked for")
        elif name not in seen:
            seen.add(name)
            todo += [Requirement(line) for line in metadata.requires(name) or ()]
    return found


def measure_lock(_: int) -> Outcome:
    """Number of dependencies, and the lock."""
    lock = LOCK.read_text(encoding="utf-8")
    names = sorted({requirement.name for requirement in required(("cpu",))})
    found = problems(lock)
    broken = {
        "a hash left out": re.sub(r"(?s)(numpy==\S+).*?(?=\n\S)", r"\1", lock, count=1),
        "an older version": re.sub(r"uvicorn==\S+", "uvicorn==0.1.0", lock),
        "a package left out": re.sub(r"(?ms)^h11==.*?(?=^\S)", "", lock),
    }
    caught = {name: bool(problems(text)) for name, text in broken.items()}
    return Outcome(
        f"{len(names)} dependencies ({', '.join(names)}), {lock.count('==')} packages locked, {len(found)} problems"
        + (f"; first: {found[0]}" if found else ""),
        len(names) <= _MOST_DEPENDENCIES and not found,
        caught,
    )


def audit(requirements: Path) -> tuple[list[str], str]:
    """Ask the services about every line: known vulnerabilities; and why nothing was learnt, or nothing."""
    reasons = []
    for service in _SERVICES:
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", "-r", str(requirements), "--disable-pip", "--no-deps", "-f", "json",
             "-s", service, "--progress-spinner", "off"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if not done.stdout.startswith("{"):
            reasons.append(f"{service}: {(done.stderr.strip() or 'no answer').splitlines()[-1][:200]}")
            continue
        packages = json.loads(done.stdout)["dependencies"]
        # pip-audit passes over what a service does not know, and ends with 0.
        skipped = [package["name"] for package in packages if "skip_reason" in package]
        if skipped or not packages:
            reasons.append(f"{service} does not know {', '.join(skipped[:3]) or 'anything'}")
            continue
        return [f"{each['name']} {each['version']}: {vulnerability['id']}"
                for each in packages for vulnerability in each["vulns"]], ""  # fmt: skip
    return [], "; ".join(reasons)


def measure_audit(_: int) -> Outcome:
    """Known vulnerabilities of what is locked."""
    found, reason = audit(LOCK)
    with tempfile.TemporaryDirectory() as folder:
        control = Path(folder) / "requirements.txt"
        control.write_text(_VULNERABLE + "\n", encoding="utf-8")
        caught = {"a vulnerable package": bool(audit(control)[0])}
    if reason:
        return Outcome(f"not audited: {reason}", False, caught)
    return Outcome(f"{len(found)} known vulnerabilities" + (f"; first: {found[0]}" if found else ""), not found, caught)


def write_sbom() -> None:
    """Write the SBOM of what is locked, the same bytes for the same lock."""
    SBOM.parent.mkdir(exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "cyclonedx_py", "requirements", str(LOCK), "--pyproject", str(ROOT / "pyproject.toml"),
         "--mc-type", "library", "--output-reproducible", "--of", "JSON", "-o", str(SBOM)],
        check=True,
    )  # fmt: skip


def main() -> int:
    """Check the lock, write the SBOM, ask the services."""
    found = problems(LOCK.read_text(encoding="utf-8"))
    write_sbom()
    sys.stdout.write(f"SBOM: {SBOM.relative_to(ROOT)}\n")
    vulnerabilities, reason = audit(LOCK)
    for line in (*found, *vulnerabilities):
        sys.stdout.write(f"{line}\n")
    if reason:
        sys.stdout.write(f"NOT AUDITED: no vulnerability service could be asked ({reason})\n")
    return 1 if found or vulnerabilities else 2 if reason else 0


FIGURES = (
    Figure("F3", "runtime dependencies with onnxruntime; problems of the lock", "<= 4; 0", measure_lock, quick=1),
    Figure("F3b", "known vulnerabilities of what is locked", "0", measure_audit, soak=1),
)

if __name__ == "__main__":
    raise SystemExit(main())
