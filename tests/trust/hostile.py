"""Bundles whose manifest is right about graphs, tokenizers and figures that are wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from m3e.manifest import File, Graph, Manifest

CONTRIB = "com.microsoft"


def field(number: int, payload: bytes) -> bytes:
    """A field of bytes in protobuf's wire format."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def varint(value: int) -> bytes:
    """A number in protobuf's wire format."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _external(model: onnx.ModelProto, location: str, **more: str) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)


def _subgraph(depth: int) -> onnx.GraphProto:
    output = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    inner = [helper.make_node("If", ["c"], ["x"], then_branch=_subgraph(depth - 1))] if depth else []
    return helper.make_graph(inner, "g", [], [output])


def _branch(op_type: str, domain: str = "", **attributes: Any) -> onnx.GraphProto:
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node(op_type, ["input_ids"], ["y"], domain=domain, **attributes)
    return helper.make_graph([node], "branch", [], [output])


def _add(op_type: str, domain: str = "", **attributes: Any) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node(op_type, ["input_ids"], ["evil"], domain=domain, **attributes))

    return change


def _constant(tensor: onnx.TensorProto) -> Callable[[onnx.ModelProto], None]:
    return _add("Constant", value=tensor)


def _tensor(**fields: object) -> Callable[[onnx.ModelProto], None]:
    """Change fields of the first initializer, such as ``dims`` or ``data_type``."""

    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        for name, value in fields.items():
            if isinstance(value, list):
                tensor.ClearField(name)
                getattr(tensor, name).extend(value)
            else:
                setattr(tensor, name, value)

    return change


def _function(model: onnx.ModelProto) -> None:
    call = helper.make_node("F", [], [], domain=CONTRIB)  # calls itself
    model.functions.append(helper.make_function(CONTRIB, "F", [], [], [call], model.opset_import))


def _sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add(dims=[1])


def _training(model: onnx.ModelProto) -> None:
    model.training_info.add()


def _metadata(model: onnx.ModelProto) -> None:
    helper.set_model_props(model, {"ort_config": '{"session_options": {}}'})


def _external_constant() -> onnx.TensorProto:
    tensor = TensorProto(name="t", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


# A change of the parsed model, or of its bytes; and a word of the refusal.
GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], None] | Callable[[bytes], bytes], str]] = {
    "external file above": (lambda m: _external(m, "../secret"), "external_data|data_location"),
    "external file, absolute": (lambda m: _external(m, "/etc/passwd"), "external_data|data_location"),
    "external file beside": (lambda m: _external(m, "vocab.txt", offset="0", length="4"), "external_data"),
    "external, a folder and back": (lambda m: _external(m, "a/../../secret"), "external_data"),
    "external, of the process": (lambda m: _external(m, "/proc/self/environ"), "external_data"),
    "external, enormous": (lambda m: _external(m, "vocab.txt", length=str(2**60)), "external_data"),
    "external, negative": (lambda m: _external(m, "vocab.txt", offset="-1"), "external_data"),
    "address in memory": (
        lambda m: _external(m, "*/_ORT_MEM_ADDR_/*", offset="4096", length="1024"), "external_data"),
    "data_location alone": (_tensor(data_location=1), "data_location"),
    "external constant": (_constant(_external_constant()), "external_data"),
    "sparse initializer": (_sparse, "sparse_initializer"),
    "sparse attribute": (_add("Constant", sparse_value=onnx.SparseTensorProto(dims=[1])), "sparse_tensor"),
    "compiled engine": (_add("EPContext", CONTRIB, ep_cache_context="../engine", embed_mode=0), "EPContext"),
    "custom domain": (_add("Evil", "com.evil"), "com.evil"),
    "domain of classical models": (_add("ArrayFeatureExtractor", "ai.onnx.ml"), "ai.onnx.ml"),
    "domain by another name": (_add("Identity", "ai.onnx"), "ai.onnx"),
    "domain imported alone": (lambda m: m.opset_import.add(domain="com.evil", version=1), "com.evil"),
    "operator that is not listed": (_add("Sin"), "the operator Sin is not allowed"),
    "engine in a branch": (_add("If", then_branch=_branch("EPContext", CONTRIB)), "EPContext is not allowed"),
    "custom domain in a branch": (_add("If", else_branch=_branch("Evil", "com.evil")), "com.evil"),
    "external file in a branch": (_add("If", then_branch=_branch("Constant", value=_external_constant())),
                                  "external_data"),
    "another operator with a branch": (_add("Identity", body=_branch("Identity")), "Identity has a subgraph"),
    "Loop": (_add("Loop", body=_subgraph(0)), "subgraph"),
    "Scan": (_add("Scan", body=_subgraph(0)), "subgraph"),
    "subgraphs, 20 deep": (_add("If", then_branch=_subgraph(20)), "subgraph"),
    "list of subgraphs": (_add("If", branches=[_subgraph(0)]), "subgraph"),
    "function that calls itself": (_function, "functions"),
    "training": (_training, "training_info"),
    "options for the session": (_metadata, "metadata_props"),
    "shape too large": (_tensor(dims=[2**40, 2**40]), "claims the shape"),
    "shape that overflows to the right size": (_tensor(dims=[2**32, 2**32, 2**32]), "claims the shape"),
    "negative size": (_tensor(dims=[-1, 64]), "claims the shape"),
    "nothing of something negative": (_tensor(dims=[0, -1], raw_data=b""), "claims the shape"),
    "shape of a hundred sizes": (_tensor(dims=[1] * 100), "claims the shape"),
    "values missing": (_tensor(raw_data=b""), "claims the shape"),
    "values in another field": (_tensor(float_data=[1.0]), "float_data"),
    "strings": (_tensor(data_type=8), "data type 8"),
    "no data type": (lambda m: m.graph.initializer[0].ClearField("data_type"), "no data_type"),
    "other outputs": (lambda m: m.graph.output.add(name="more"), "its outputs are"),
    "other opset": (lambda m: setattr(m.opset_import[0], "version", 99), "manifest says opset"),
    "other IR version": (lambda m: setattr(m, "ir_version", 99), "its IR version is 99"),
    "a million empty nodes": (lambda data: data + field(7, field(1, b"") * 1_000_000), "Model.graph is there twice"),
    "a million empty nodes, alone": (lambda data: field(7, field(1, b"") * 1_000_000), "more than 100000 fields"),
    "a million sizes": (
        lambda data: field(7, field(5, field(1, b"\1" * 1_000_000))), "more than 100000 fields"),
    "type in type": (lambda data: field(7, field(11, field(2, field(4, b"")))), "Type has an unknown field 4"),
    "group": (lambda data: b"\x0b" * 10_000, "Model.ir_version has wire type|wire type 3"),
    "length behind the end": (lambda data: data[:-1], "ends behind|ends within"),
    "length of 2^63": (lambda data: b"\x3a" + varint(2**63) + data, "ends behind"),
    "number without end": (lambda data: b"\xff" * 100, "longer than 64 bits"),
    "field zero": (lambda data: data + b"\0\0", "unknown field 0"),
    "empty": (lambda data: b"", "operator sets are"),
    "pickle": (lambda data: b"cposix\nsystem\n(S'touch canary'\ntR.", "unknown field|wire type"),
}  # fmt: skip


def _model(**fields: object) -> Callable[[Manifest], Manifest]:
    return lambda m: dataclasses.replace(m, model=dataclasses.replace(m.model, **fields))  # type: ignore[arg-type]


def _graph(**fields: object) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        first = dataclasses.replace(manifest.graphs[0], **fields)  # type: ignore[arg-type]
        return dataclasses.replace(manifest, graphs=(first, *manifest.graphs[1:]))

    return change


def _certificate(**fields: object) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        certificate = manifest.graphs[0].certificate
        assert certificate is not None
        return _graph(certificate=dataclasses.replace(certificate, **fields))(manifest)  # type: ignore[arg-type]

    return change


def _tokens(**parts: object) -> Callable[[dict[str, Any]], object]:
    """Change parts of a ``tokenizer.json``; of its model by ``model__NAME``."""

    def change(content: dict[str, Any]) -> None:
        for name, value in parts.items():
            *above, last = name.split("__")
            (content["model"] if above else content)[last] = value

    return change


def _replace(pattern: dict[str, str], content: str) -> Callable[[dict[str, Any]], object]:
    return _tokens(normalizer={"type": "Replace", "pattern": pattern, "content": content})


def _template(*pieces: str, ids: list[int]) -> Callable[[dict[str, Any]], object]:
    single = [{"SpecialToken": {"id": piece, "type_id": 0}} for piece in pieces]
    specials = {piece: {"id": piece, "ids": ids, "tokens": [piece] * len(ids)} for piece in pieces}
    return _tokens(
        post_processor={"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": specials}
    )


_EVIL = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}

# A change of a bundle's tokenizer.json, which is sealed again; and a word of the refusal.
TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "evil expression": (_tokens(pre_tokenizer=_EVIL), "pre_tokenizer Split has the regular expression"),
    "evil expression in a sequence": (
        _tokens(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": [_EVIL]}]}),
        "pre_tokenizer Split has the regular expression"),
    "evil expression in the decoder": (
        _tokens(decoder={"type": "Replace", "pattern": {"Regex": "(a|a)*b"}, "content": ""}),
        "decoder Replace has the regular expression"),
    "expression that outgrows memory": (_replace({"Regex": "((a{9999}){9999}){9999}"}, ""), "normalizer Replace has"),
    "replacement of a megabyte": (
        _replace({"String": "a"}, "a" * 2**20), "normalizer makes texts up to 1048576 times as long"),
    "replacements of replacements": (
        _tokens(normalizer={"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 20}),
        "normalizer makes texts up to 1048576 times as long"),
    "a megabyte in front": (_tokens(normalizer={"type": "Prepend", "prepend": "a" * 2**20}), "normalizer makes texts"),
    "replacement of nothing": (_replace({"String": ""}, "a"), "normalizer Replace has the pattern"),
    "a thousand steps": (
        _tokens(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 1000}),
        "normalizer has 1000 steps"),
    "normalizer of another kind": (_tokens(normalizer={"type": "Evil"}), "normalizer 'Evil'"),
    "pre-tokenizer without a kind": (_tokens(pre_tokenizer={"pattern": "a"}), "pre_tokenizer None"),
    "model of another kind": (_tokens(model__type="Evil"), "model 'Evil'"),
    "words of 2^40 characters": (_tokens(model__max_input_chars_per_word=2**40), "max_input_chars_per_word"),
    "dropout": (_tokens(model__dropout=0.1), "dropout of 0.1"),
    "empty vocabulary": (_tokens(model__vocab={}), "empty vocabulary"),
    "vocabulary of another kind": (_tokens(model__vocab=3), "model has the vocabulary 3, expected tokens"),
    "vocabulary larger than the model": (
        _tokens(model__vocab={str(i): i for i in range(100_000)}), "has ids up to 100004"),
    "id of 2^31": (_tokens(model__vocab={"[UNK]": 0, "x": 2**31}), "has ids up to 2147483648"),
    "added tokens beyond the model": (
        _tokens(added_tokens=[{"id": i, "content": f"<{i}>"} for i in range(30_000)]), "has ids up to"),
    "a thousand special tokens": (_template(*["[CLS]"] * 1000, ids=[2]), "expected a list of at most 8 special tokens"),
    "special token of many ids": (_template("[CLS]", ids=[2] * 1000), "has the special tokens' ids"),
    "special token beyond the model": (_template("[CLS]", ids=[2**31]), "has the special tokens' ids"),
}  # fmt: skip

# A change of a manifest, which is sealed again; and what the refusal begins with.
MANIFESTS: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "texts of -1 tokens": (_model(max_seq_length=-1), "model.max_seq_length is -1, expected 3 to"),
    "texts of no token": (_model(max_seq_length=0), "model.max_seq_length is 0, expected 3 to"),
    "texts of special tokens alone": (_model(max_seq_length=2), "model.max_seq_length is 2, expected 3 to"),
    "texts of 2^70 tokens": (_model(max_seq_length=2**70), f"model.max_seq_length is {2**70}, expected 3 to"),
    "vectors of no value": (_model(embedding_dim=0), "model.embedding_dim is 0, expected 1 to"),
    "no layer": (_model(num_layers=0), "model.num_layers is 0, expected 1 to"),
    "vocabulary of 2^60": (_model(vocab_size=2**60), f"model.vocab_size is {2**60}, expected 1 to"),
    "no pooling": (_model(pooling=()), "model.pooling is empty"),
    "no golden text": (lambda m: dataclasses.replace(m, golden=()), "golden is empty"),
    "no graph": (lambda m: dataclasses.replace(m, graphs=()), "graphs is empty"),
    "canary tolerance NaN": (
        _graph(canary_tolerance=float("nan")), "graphs[0].canary_tolerance is nan, expected a finite number"),
    "canary tolerance infinite": (
        _graph(canary_tolerance=float("inf")), "graphs[0].canary_tolerance is inf, expected a finite number"),
    "canary tolerance -1": (_graph(canary_tolerance=-1.0), "graphs[0].canary_tolerance is -1.0, expected more than 0"),
    "canary tolerance 0": (_graph(canary_tolerance=0.0), "graphs[0].canary_tolerance is 0.0, expected more than 0"),
    "canary tolerance 10^9": (_graph(canary_tolerance=1e9), "graphs[0].canary_tolerance is 1000000000.0, expected"),
    "certificate NaN": (
        _certificate(min_cosine=float("nan")), "graphs[0].certificate.min_cosine is nan, expected a finite number"),
    "certificate -infinity": (
        _certificate(max_abs_difference=float("-inf")), "graphs[0].certificate.max_abs_difference is -inf"),
}  # fmt: skip


def replace_graph(folder: Path, change: Callable[..., object]) -> None:
    """Change the first graph of a bundle and seal the manifest: names, sizes and hashes agree."""
    graph = read_manifest(folder).graphs[0]
    data = (folder / graph.file).read_bytes()
    if change.__code__.co_varnames[:1] == ("data",):
        changed = change(data)
        assert isinstance(changed, bytes)
    else:
        model = onnx.load_from_string(data)
        change(model)
        changed = model.SerializeToString()
    (folder / graph.file).write_bytes(changed)
    seal(folder, graph)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle."""
    return Manifest.from_bytes((folder / "manifest.json").read_bytes())


def replace_manifest(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Change the manifest of a bundle and seal it."""
    (folder / "manifest.json").write_bytes(change(read_manifest(folder)).to_bytes())


def replace_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tokenizer of a bundle and seal the manifest: names, sizes and hashes agree."""
    content = json.loads((folder / "tokenizer.json").read_bytes())
    change(content)
    data = json.dumps(content).encode()
    (folder / "tokenizer.json").write_bytes(data)
    manifest, entry = read_manifest(folder), File(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    sealed = dataclasses.replace(manifest, files={**manifest.files, "tokenizer.json": entry})
    (folder / "manifest.json").write_bytes(sealed.to_bytes())


def seal(folder: Path, graph: Graph) -> None:
    """Write the manifest that is right about a file, and that lists the operators a hostile one would list."""
    manifest, data = read_manifest(folder), (folder / graph.file).read_bytes()
    entry = File(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    listed = dataclasses.replace(graph, ops=(*graph.ops, "If", "Loop", "Scan", "Constant", f"{CONTRIB}::EPContext"))
    sealed = dataclasses.replace(
        manifest, files={**manifest.files, graph.file: entry}, graphs=(listed, *manifest.graphs[1:])
    )
    (folder / "manifest.json").write_bytes(sealed.to_bytes())
