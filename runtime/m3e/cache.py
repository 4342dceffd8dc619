"""Hub ids -> bundles in the cache folder: where they lie, and which one answers for an id.

    $XDG_CACHE_HOME/m3e/bundles-v1/moka-ai--m3e-base/refs/HEAD            the commit that answers without a revision
    $XDG_CACHE_HOME/m3e/bundles-v1/moka-ai--m3e-base/COMMIT/fp32+int8     a bundle of that commit with those graphs

Bundles there are never changed, only added. Whatever is in the cache answers without a look at the network; it is
``m3e pull`` that asks the hub again. The number is the manifest's format version.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from m3e.errors import BundleError, DependencyError
from m3e.manifest import FORMAT_VERSION, MANIFEST_NAME

_HUB_ID = re.compile(r"(modelscope:)?[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def cache_folder() -> Path:
    """The folder of everything that m3e may make again: XDG Base Directory Specification 0.8."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # "All paths must be absolute. If an implementation encounters a relative path it should [...] ignore it."
    return (Path(given) if Path(given).is_absolute() else Path.home() / ".cache") / "m3e"


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether a name without a folder means a model of a hub: ORGANISATION/MODEL, and no folder ORGANISATION here."""
    text = os.fspath(name)
    return _HUB_ID.fullmatch(text) is not None and not Path(text).exists() and not Path(text).parent.is_dir()


def repository_folder(hub_id: str) -> Path:
    """The folder of an id's bundles."""
    return cache_folder() / f"bundles-v{FORMAT_VERSION}" / hub_id.replace("/", "--").replace(":", "--")


def bundle_folder(hub_id: str, commit: str, precisions: Sequence[str]) -> Path:
    """Where a bundle with these graphs of a commit lies, or will lie."""
    return repository_folder(hub_id) / quote(commit, safe="") / "+".join(sorted(set(precisions)))


def reference_file(hub_id: str, revision: str | None) -> Path:
    """The file that holds the commit of a revision as it was when it was last pulled."""
    return repository_folder(hub_id) / "refs" / quote(revision or "HEAD", safe="")


def find_cached(hub_id: str, revision: str | None, precision: str) -> Path | None:
    """Find a bundle of an id in the cache; no network.

    Args:
        hub_id: Such as ``moka-ai/m3e-base``.
        revision: Branch or tag as it was last pulled, or a commit; None for the hub's default.
        precision: Precision or file of a graph that it must have, or ``auto``.

    Returns:
        The bundle's folder, the one with the most graphs if there are several; None if there is none.
    """
    try:
        commit = reference_file(hub_id, revision).read_text(encoding="utf-8")
    except FileNotFoundError:
        commit = revision or ""
    folder = repository_folder(hub_id) / quote(commit, safe="")
    found = [path for path in folder.glob("*") if commit and (path / MANIFEST_NAME).is_file()]
    having = [
        path for path in found
        if precision == "auto" or precision in path.name.split("+") or (path / precision).is_file()
    ]  # fmt: skip
    return max(having, key=lambda path: (path.name.count("+"), path.name), default=None)


def locate(bundle: str | os.PathLike[str], revision: str | None = None, precision: str = "auto") -> Path:
    """Find a bundle by folder or hub id, without network.

    Raises:
        BundleError: A hub id that has not been pulled, or a folder with a revision.
    """
    if not is_hub_id(bundle):
        if revision is not None:
            raise BundleError(f"{os.fspath(bundle)!r} is a folder and has no revisions; leave out {revision!r}")
        return Path(bundle)
    hub_id = os.fspath(bundle)
    found = find_cached(hub_id, revision, precision)
    if found is None:
        raise BundleError(
            f"{_describe(hub_id, revision, precision)}; make it with {_command(hub_id, revision, precision)}"
        )
    return found


def obtain(bundle: str | os.PathLike[str], revision: str | None = None, precision: str = "auto") -> Path:
    """Find a bundle by folder or hub id; what is not in the cache is converted, if the exporter is installed.

    Raises:
        BundleError: A folder with a revision.
        DependencyError: A hub id that is not in the cache, without the exporter.
        ExportError: The conversion failed.
    """
    if not is_hub_id(bundle) or find_cached(os.fspath(bundle), revision, precision) is not None:
        return locate(bundle, revision, precision)
    hub_id = os.fspath(bundle)
    if precision.endswith(".onnx"):
        raise BundleError(f"{_describe(hub_id, revision, precision)}; pull it by its precision")
    if precision == "fp16":
        raise BundleError(
            f"{_describe(hub_id, revision, precision)}, which has graphs for the CPU; make a bundle with "
            f"'m3e convert {hub_id} -o DIR --target cuda' (or tensorrt), and open DIR"
        )
    pull = _puller()
    if pull is None:
        raise DependencyError(
            f"{_describe(hub_id, revision, precision)}, and converting it here needs the exporter: "
            'pip install "m3e-runtime[cpu,export]". Or run '
            f"{_command(hub_id, revision, precision)} elsewhere and copy {cache_folder()}; or give a bundle's folder"
        )
    precisions = ("fp32",) if precision in ("auto", "fp32") else ("fp32", precision)
    return pull(hub_id, revision=revision, precisions=precisions)


def _puller() -> Callable[..., Path] | None:
    """The exporter's function, found as an entry point: the runtime knows its name and nothing more."""
    for entry in metadata.entry_points(group="m3e.exporters", name="pull"):
        try:
            pull: Any = entry.load()
        except ImportError:  # the package is there, its requirements are not
            return None
        return pull  # type: ignore[no-any-return]
    return None


def _describe(hub_id: str, revision: str | None, precision: str) -> str:
    wanted = f"{hub_id}@{revision}" if revision else hub_id
    graph = "" if precision == "auto" else f" with an {precision} graph"
    return f"{wanted!r} is neither a folder here nor{graph} in the cache {str(cache_folder())!r}"


def _command(hub_id: str, revision: str | None, precision: str) -> str:
    options = f" --revision {revision}" if revision else ""
    options += "" if precision in ("auto", "fp32") else f" --precision fp32 {precision}"
    return f"'m3e pull {hub_id}{options}'"
