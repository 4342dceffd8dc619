from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from m3e_export import reference
from m3e_export.checkpoint import load_checkpoint
from m3e_export.encoder_math import erf
from m3e_export.reference import numpy_token_embeddings, reference_embeddings, reference_name
from m3e_export.sources import fetch_checkpoint


def test_erf_is_the_error_function() -> None:
    x = np.random.default_rng(0).uniform(-8, 8, 20_000)
    expected = np.array([math.erf(value) for value in x])
    assert np.abs(erf(x) - expected).max() < 5e-13
    assert np.abs(erf(x.astype(np.float32)) - expected).max() < 1e-6


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new"])
def test_the_numpy_reference_is_pytorch_in_float64(tiny_checkpoint: Path, hidden_act: str) -> None:
    import torch
    from transformers import BertConfig, BertModel

    checkpoint = load_checkpoint(fetch_checkpoint(str(tiny_checkpoint)))
    import dataclasses

    checkpoint = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, hidden_act=hidden_act))
    config = BertConfig.from_pretrained(tiny_checkpoint, hidden_act=hidden_act, dtype=torch.float64)
    bert: torch.nn.Module = BertModel.from_pretrained(tiny_checkpoint, config=config, add_pooling_layer=False)
    bert.to(torch.float64)
    ids = np.random.default_rng(1).integers(0, 21128, 200).tolist()
    with torch.inference_mode():
        expected = bert(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
    assert expected.dtype == np.float64
    assert np.abs(numpy_token_embeddings(checkpoint, ids) - expected).max() < 1e-10


def test_both_references_agree(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load_checkpoint(fetch_checkpoint(str(tiny_checkpoint)), normalize=True)
    ids = [[2, 300, 3], [2, 500, 600, 700, 3]]
    assert reference_name().startswith("torch 2")
    by_torch = list(reference_embeddings(checkpoint, ids))
    monkeypatch.setattr(reference, "_has_torch", lambda: False)
    assert reference_name().startswith("numpy")
    by_numpy = list(reference_embeddings(checkpoint, ids))
    np.testing.assert_allclose(by_torch, by_numpy, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(by_numpy, axis=1), 1, atol=1e-12)
