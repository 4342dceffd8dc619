"""A bundle on disk: a folder whose manifest accounts for every file in it.

Nothing of a file is used before its name, size and hash agree with the manifest, and what is used are the very bytes
that were hashed.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from m3e.errors import BundleError
from m3e.graph_check import check_graph
from m3e.manifest import MANIFEST_NAME, File, Graph, Manifest
from m3e.tokenizer_check import check_tokenizer

# The one file that may come later: what this bundle's similarities mean, learnt on its owner's pairs. It decides no
# vector, so the manifest does not know it; it carries its own hash.
SIDE_NAME = "similarity.json"

_MAX_MANIFEST_BYTES = 16 << 20
_REPAIR = "convert the checkpoint again, or copy the bundle again"
PRECISIONS = ("fp32", "int8", "fp16")


class Bundle:
    """A folder written by the exporter, with its manifest read and its file names and sizes checked.

    Args:
        folder: The bundle's folder.

    Raises:
        BundleError: The folder is missing, is no bundle, or does not hold exactly the manifest's files.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise BundleError(
                f"no bundle at {str(self.folder)!r}: there is no such folder; "
                f"make one with 'python export/convert.py CHECKPOINT -o {self.folder}'"
            )
        if not (self.folder / MANIFEST_NAME).exists():
            raise BundleError(
                f"{str(self.folder)!r} is not a bundle: it has no {MANIFEST_NAME}; "
                f"if it is a checkpoint, convert it: 'python export/convert.py {self.folder} -o DIR'"
            )
        self.manifest = Manifest.from_bytes(self._read(MANIFEST_NAME, None))
        self._check_names()

    def graph(self, precision: str, target: str, features: frozenset[str] | None = None) -> Graph:
        """Find the graph of a precision for a target, the one that makes most of the processor if there are several.

        Args:
            precision: Of the graph, or the name of its file, which is taken whatever the processor is.
            target: Such as ``cpu``.
            features: What the processor has; None if that is not known, and the canary will have to tell.

        Raises:
            BundleError: The bundle has no such graph, or none that this processor computes right.
        """
        graphs = [graph for graph in self.manifest.graphs if graph.target == target]
        for graph in graphs:
            if graph.file == precision:
                return graph
        graphs = [graph for graph in graphs if graph.precision == precision]
        if not graphs:
            available = ", ".join(f"{graph.precision} for {graph.target}" for graph in self.manifest.graphs)
            if precision not in PRECISIONS:
                hint = f"precisions are {', '.join(PRECISIONS)}"
            elif precision == "fp16" and target == "cpu":
                hint = "fp16 is for device='cuda' and 'tensorrt'"
            else:
                hint = f"convert again with '--precision {precision} --target {target}'"
            raise BundleError(f"{str(self.folder)!r} has no {precision} graph for {target}, only {available}; {hint}")
        fitting = [graph for graph in graphs if features is None or features.issuperset(graph.cpu_features)]
        if not fitting:
            needed = " or ".join(" and ".join(graph.cpu_features) for graph in graphs)
            raise BundleError(
                f"the {precision} graph of {str(self.folder)!r} needs a processor with {needed}, which this one lacks: "
                "it would compute wrong sums. Convert again with '--cpu avx2', or use the fp32 graph"
            )
        return max(fitting, key=lambda graph: len(graph.cpu_features))

    def read(self, name: str) -> bytes:
        """Read a file of the manifest whole and check it.

        Returns:
            The bytes whose hash agreed with the manifest.

        Raises:
            BundleError: Not in the manifest, another size or hash than it says, or not a regular file.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{str(self.folder)!r} has no {name} among its manifest's files; {_REPAIR}")
        return self._read(name, self.manifest.files[name])

    def read_graph(self, graph: Graph) -> bytes:
        """Read a graph, and refuse what onnxruntime should not see.

        Returns:
            The ONNX file.

        Raises:
            BundleError: As `read`; or the graph is not what the manifest says, or holds more than operators and their
                weights.
        """
        data = self.read(graph.file)
        check_graph(data, graph)
        return data

    def read_tokenizer(self) -> bytes:
        """Read ``tokenizer.json``, and refuse what the library tokenizers should not see.

        Returns:
            The file.

        Raises:
            BundleError: As `read`; or it holds a step that no encoder's tokenizer has, or ids that the model lacks.
        """
        data = self.read("tokenizer.json")
        check_tokenizer(data, self.manifest.model.vocab_size)
        return data

    def side_file(self) -> bytes | None:
        """Read ``similarity.json``; None where the bundle has none. Its reader checks the hash that it carries.

        Raises:
            BundleError: It is not a plain file of a sensible size.
        """
        path = self.folder / SIDE_NAME
        return self._read(SIDE_NAME, None) if path.exists() or path.is_symlink() else None

    def verify(self) -> None:
        """Hash every file.

        Raises:
            BundleError: The first file that does not match the manifest.
        """
        for name in self.manifest.files:
            self.read(name)

    def _check_names(self) -> None:
        declared = {**self.manifest.files, MANIFEST_NAME: None}
        present = {
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_symlink() or not path.is_dir()
        }
        problems = [f"{name} is missing" for name in sorted(declared.keys() - present)]
        problems += [f"{name} is not in the manifest" for name in sorted(present - declared.keys() - {SIDE_NAME})]
        problems += [f"graph {graph.file} is not among the files" for graph in self.manifest.graphs
                     if graph.file not in declared]  # fmt: skip
        for name in sorted(self.manifest.files.keys() & present):
            expected, size = self.manifest.files[name].size_bytes, (self.folder / name).lstat().st_size
            if size != expected:
                problems.append(f"{name} has {size} bytes, the manifest says {expected}")
        if problems:
            raise BundleError(f"{str(self.folder)!r} does not match its manifest: {'; '.join(problems)}; {_REPAIR}")

    def _read(self, name: str, expected: File | None) -> bytes:
        path = self.folder / name
        try:
            file = open(path, "rb", opener=_open_descriptor)  # noqa: SIM115 (closed below)
        except OSError as error:
            raise BundleError(f"cannot read {str(path)!r}: {error.strerror}; links are refused; {_REPAIR}") from error
        with file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise BundleError(f"{str(path)!r} is not a plain file of its own (a link, pipe or device); {_REPAIR}")
            limit = _MAX_MANIFEST_BYTES if expected is None else expected.size_bytes
            if status.st_size > limit or (expected is not None and status.st_size != limit):
                raise BundleError(f"{str(path)!r} has {status.st_size} bytes, expected {limit}; {_REPAIR}")
            data = file.read(limit + 1)
        if expected is not None and hashlib.sha256(data).hexdigest() != expected.sha256:
            raise BundleError(f"{str(path)!r} is damaged: its sha256 is not the manifest's; {_REPAIR}")
        return data


def _open_descriptor(path: str, flags: int) -> int:
    """Open without following a link and without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
