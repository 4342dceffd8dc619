"""Run by tests/test_uniem.py in an environment that has uniem: fine-tune an encoder with each strategy, then encode.

    python uniem_finetune.py ENCODER OUTPUT TEXTS

For each strategy OUTPUT gets the folder that uniem's FineTuner saved, and beside it an .npy file of uniem's vectors of
the lines of TEXTS.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer
from uniem.finetuner import FineTuner
from uniem.model import PoolingStrategy, Uniem, create_uniem_embedder

PAIRS = [
    {"text": "今天天气真好", "text_pos": "天气晴朗，适合散步"},
    {"text": "怎么修改密码", "text_pos": "忘记密码了怎么办"},
    {"text": "合同什么时候到期", "text_pos": "合同的截止日期是哪天"},
    {"text": "how to return an item", "text_pos": "I want to send this back"},
]


def main(encoder: str, output: str, texts: str) -> None:
    """Fine-tune, save, read back and encode."""
    lines = Path(texts).read_text(encoding="utf-8").split("\n")
    for strategy in PoolingStrategy:
        folder = Path(output) / strategy.value
        tuner = FineTuner(
            create_uniem_embedder(encoder, pooling_strategy=strategy),
            AutoTokenizer.from_pretrained(encoder),
            PAIRS,
            model_type="uniem",
        )
        tuner.run(epochs=2, batch_size=2, lr=1e-3, output_dir=folder)
        # The length is named: uniem's default is transformers' config.max_length, which is 20. One text at a time:
        # last_weighted gives its encoder no mask, so that padding would be attended to.
        model = Uniem.from_pretrained(str(folder / "model"), max_length=512)
        np.save(folder / "vectors.npy", np.stack(model.encode(lines, batch_size=1)))


if __name__ == "__main__":
    main(*sys.argv[1:])
