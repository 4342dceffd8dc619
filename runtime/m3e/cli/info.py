"""Show what a bundle is, without opening its graphs.

Examples:
  m3e info bundles/m3e-base
  m3e info bundles/m3e-base --json | jq .model
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from m3e.bundle import Bundle
from m3e.cache import locate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", help="folder written by convert.py, or hub id that was pulled")
    parser.add_argument("--json", action="store_true", help="the whole manifest without its arrays")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    manifest = Bundle(locate(parsed.bundle)).manifest
    if parsed.json:
        content = dataclasses.asdict(manifest)
        for graph in content["graphs"]:
            del graph["golden_embeddings"]
        del content["embedding_ranges"], content["unit_embedding_ranges"]
        sys.stdout.write(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        return
    model, source = manifest.model, manifest.source
    facts = {
        "source": source.id + (f" at {source.revision}" if source.revision else ""),
        "model": f"{model.architecture}, {model.num_layers} layers x {model.hidden_size}",
        "vectors": f"{model.embedding_dim} dimensions, {' + '.join(model.pooling)} pooling, "
        + ("unit length" if model.normalize else "not normalised"),
        "longest text": f"{model.max_seq_length} tokens",
        "prompts": ", ".join(model.prompts) or "none",
        "space": manifest.space_id,
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.created_with.items()),
    }
    lines = [f"{name:<14}{value}" for name, value in facts.items()]
    for graph in manifest.graphs:
        size = manifest.files[graph.file].size_bytes
        lines.append(f"\n{graph.file} ({graph.precision} for {graph.target}, {size / 1e6:.0f} MB)")
        if graph.certificate is not None:
            lines += certificate_lines(graph.certificate)
    sys.stdout.write("\n".join(lines) + "\n")


def certificate_lines(certificate: object) -> list[str]:
    """Lay a certificate out as lines of name and value, the values below each other."""
    facts: dict[str, object] = dataclasses.asdict(certificate)  # type: ignore[call-overload]
    unsaid = ("accepted", "evaluation")  # worth a line only where a loss was accepted, or pairs were given
    facts = {name: value for name, value in facts.items() if value or name not in unsaid}
    width = max(map(len, facts)) + 2
    return [
        f"  {name:<{width}}{f'{value:.3g}' if isinstance(value, float) and value < 0.9 else value}"
        for name, value in facts.items()
    ]
