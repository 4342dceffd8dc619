"""Checkpoints that are after more than a conversion."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.trust.kills import write_file


def _json(name: str, content: str) -> Callable[[Path, Path], object]:
    return lambda folder, secret: write_file(folder / name, content.replace("SECRET", str(secret)).encode())


def _config(**fields: object) -> Callable[[Path, Path], object]:
    def change(folder: Path, secret: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def _linked(name: str) -> Callable[[Path, Path], object]:
    def change(folder: Path, secret: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)

    return change


class _Touch:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def _pickled(zipped: bool) -> Callable[[Path, Path], object]:
    def change(folder: Path, secret: Path) -> None:
        (folder / "model.safetensors").unlink()
        payload = {"weight": _Touch(secret.with_name("canary"))}
        torch.save(payload, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)

    return change


def _zip_slip(folder: Path, secret: Path) -> None:
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as file:
        file.writestr("../canary", "slipped")
        file.writestr("archive/data.pkl", b"cposix\nsystem\n(S'touch canary'\ntR.")


def _indexed(place: str) -> Callable[[Path, Path], object]:
    def change(folder: Path, secret: Path) -> None:
        (folder / "model.safetensors").unlink()
        content = {"weight_map": {"a": place.replace("SECRET", str(secret))}}
        write_file(folder / "model.safetensors.index.json", json.dumps(content).encode())

    return change


def _weights(header: bytes) -> Callable[[Path, Path], object]:
    def change(folder: Path, secret: Path) -> None:
        write_file(folder / "model.safetensors", len(header).to_bytes(8, "little") + header)

    return change


def _tokenizer(vocab: dict[str, int], **parts: object) -> Callable[[Path, Path], object]:
    model = {"type": "WordPiece", "unk_token": "[UNK]", "vocab": vocab, "continuing_subword_prefix": "##"}
    content = {"version": "1.0", "added_tokens": [], "model": model | {"max_input_chars_per_word": 100}, **parts}
    return _json("tokenizer.json", json.dumps(content))


def _modules(*paths: str) -> Callable[[Path, Path], object]:
    kinds = ["Transformer", "Pooling", "Dense"]
    entries = [{"path": path, "type": f"models.{kind}"} for path, kind in zip(paths, kinds, strict=False)]
    return _json("modules.json", json.dumps(entries))


_NO_TABLE = '{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,%s]}}'

# A change of a checkpoint's folder, given a file outside of it that is nobody's business; and a word of the refusal.
CHECKPOINTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "pickle, zip": (_pickled(True), "cannot be read as a PyTorch state dict"),
    "pickle, legacy": (_pickled(False), "cannot be read as a PyTorch state dict"),
    "zip slip": (_zip_slip, "cannot be read as a PyTorch state dict"),
    "code of its own": (_config(auto_map={"AutoModel": "evil.Model"}), "needs code of its own"),
    "module of its own": (_json("modules.json", '[{"path": "", "type": "evil.Evil"}]'), "has the modules Evil"),
    "encoder above": (_modules("..", "1_Pooling"), "names the folder"),
    "pooling above": (_modules("", "../secret"), "names the folder"),
    "pooling, absolute": (_modules("", "/etc"), "names the folder"),
    "dense, there and back": (_modules("", "1_Pooling", "1_Pooling/../../x"), "names the folder"),
    "weights above": (_indexed("../secret"), "expected a file beside it"),
    "weights, absolute": (_indexed("SECRET"), "expected a file beside it"),
    "link: vocabulary": (_linked("vocab.txt"), "outside of the checkpoint"),
    "link: config": (_linked("config.json"), "outside of the checkpoint"),
    "link: weights": (_linked("model.safetensors"), "outside of the checkpoint"),
    "link: tokens": (_linked("special_tokens_map.json"), "outside of the checkpoint"),
    "link: nobody reads it": (_linked("notes.txt"), "outside of the checkpoint"),
    "deep JSON": (_json("config.json", "[" * 100_000), "cannot be read as JSON"),
    "deep modules": (_json("modules.json", "[" * 100_000), "is no list of modules"),
    "deep pooling": (_json("1_Pooling/config.json", "[" * 100_000), "cannot be read"),
    "list for an object": (_json("config.json", "[]"), "expected a JSON object"),
    "enormous number": (_json("config.json", '{"model_type": 1' + "0" * 5000 + "}"), "cannot be read as JSON"),
    "NaN for a size": (_config(hidden_size=float("nan")), "hidden_size is nan"),
    "negative size": (_config(hidden_size=-64), "hidden_size is -64"),
    "no layers": (_config(num_hidden_layers=0), "num_hidden_layers is 0"),
    "a table of 2^60": (_config(vocab_size=2**60), "word_embeddings.weight has shape"),
    "NaN epsilon": (_config(layer_norm_eps=float("nan")), "layer_norm_eps is nan"),
    "infinite epsilon": (_config(layer_norm_eps=float("inf")), "layer_norm_eps is inf"),
    "header of 2^63": (lambda f, s: write_file(f / "model.safetensors", b"\xff" * 64), "as safetensors"),
    "header that is cut": (_weights(b'{"a":'), "as safetensors"),
    "tensor behind the end": (_weights((_NO_TABLE % ("1000", "4000")).encode()), "as safetensors"),
    "shape that overflows": (_weights((_NO_TABLE % (f"{2**62},4", "0")).encode()), "as safetensors"),
    "id of 2^31": (_tokenizer({"[UNK]": 0, "x": 2**31}), "has ids up to 2147483648"),
    "id of 2^64": (_tokenizer({"[UNK]": 2**64}), f"has ids up to {2**64}"),
    "regular expression that is broken": (
        _tokenizer({"[UNK]": 0}, pre_tokenizer={"type": "Split", "pattern": {"Regex": "("},
                                                "behavior": "Isolated", "invert": False}),
        "pre_tokenizer Split has the regular expression"),
    "vocabulary without a line": (_json("vocab.txt", ""), r"lacks \[UNK\]"),
    "vocabulary without a token": (_tokenizer({}), "an empty vocabulary"),
    "map that SentencePiece did not write": (
        _tokenizer({"[UNK]": 0}, normalizer={"type": "Precompiled", "precompiled_charsmap": ""}), "as a tokenizer"),
    "tokenizer of another kind": (_json("tokenizer.json", '{"model": {"type": "Evil"}}'), "model 'Evil' is not"),
    "deep tokenizer": (_json("tokenizer.json", "[" * 100_000), "as a tokenizer"),
}  # fmt: skip
