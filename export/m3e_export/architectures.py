"""The encoders that are built here, as data: how each one's files differ from BERT's.

They are one computation: embeddings, then layers of attention and feed-forward block with the norms behind them
(Vaswani et al. 2017, arXiv 1706.03762). What differs is what things are called, where positions start, which
tables are added to the word embeddings, and whether attention has a bias. A new architecture of this kind is an entry
in `ARCHITECTURES`; `walk` and everything behind it see BERT's names only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3e.errors import CheckpointError

# transformers' names of activations (transformers/activations.py) -> the function.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
OPTIMUM = "--frontend optimum exports other architectures"
DECODER = (
    "converted are encoders, where every token sees the whole text. Serve it with sentence-transformers or "
    "text-embeddings-inference, or choose an encoder"
)
_GENERATORS = ("ForCausalLM", "ForConditionalGeneration")  # ends of transformers' class names


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How an architecture's files differ from BERT's.

    Attributes:
        prefix: Stands before the encoder's tensor names in checkpoints that have a head.
        tensor_names: Parts of tensor names and BERT's, replaced in this order.
        field_names: Fields of `EncoderConfig` that ``config.json`` calls otherwise.
        defaults: What transformers takes for fields that ``config.json`` leaves out.
        fixed: Fields that transformers does not read from ``config.json``.
    """

    prefix: str
    tensor_names: tuple[tuple[str, str], ...] = ()
    field_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """The numbers that decide an encoder's shape and arithmetic, under BERT's names.

    Attributes:
        architecture: Key of `ARCHITECTURES`; transformers' ``model_type``.
        vocab_size: Rows of the word embeddings.
        embedding_size: Width of the embeddings; a linear layer follows where it is not ``hidden_size``.
        hidden_size: Width of the layers.
        num_hidden_layers: Layers.
        num_attention_heads: Heads of each layer's attention.
        intermediate_size: Inner width of the feed-forward blocks.
        max_position_embeddings: Rows of the position table.
        type_vocab_size: Rows of the token type table; 0 for none.
        task_type_vocab_size: Rows of ERNIE's task type table; 0 for none.
        num_position_buckets: Rows of the table of MPNet's relative positions; 0 for none.
        padding_position: The row of the position table that pads have, and that positions count up from; None where
            they count from 0 and know no pads. It is the pad token's id.
        layer_norm_eps: Epsilon of the layer normalisations.
        hidden_act: A key of `ACTIVATIONS`.
    """

    architecture: str
    vocab_size: int
    embedding_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    task_type_vocab_size: int
    num_position_buckets: int
    padding_position: int | None
    layer_norm_eps: float
    hidden_act: str

    @property
    def max_seq_length(self) -> int:
        """The most tokens that have a position."""
        return self.max_position_embeddings - (0 if self.padding_position is None else self.padding_position + 1)


# What BERT has not: embeddings of another width than the layers', further tables, positions that know pads.
_PLAIN = {"embedding_size": None, "task_type_vocab_size": 0, "num_position_buckets": 0, "padding_position": None}
_BERT = Architecture(
    prefix="bert.",
    defaults={"layer_norm_eps": 1e-12, "hidden_act": "gelu", "type_vocab_size": 2},
    fixed=_PLAIN,
)
# fairseq's models number positions from the pad token's id on (transformers: create_position_ids_from_input_ids).
_ROBERTA = Architecture(
    prefix="roberta.",
    field_names={"padding_position": "pad_token_id"},
    defaults={**_BERT.defaults, "padding_position": 1},
    fixed={name: value for name, value in _PLAIN.items() if name != "padding_position"},
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": Architecture(
        prefix="distilbert.",
        tensor_names=(
            ("transformer.layer.", "encoder.layer."),
            (".attention.q_lin.", ".attention.self.query."),
            (".attention.k_lin.", ".attention.self.key."),
            (".attention.v_lin.", ".attention.self.value."),
            (".attention.out_lin.", ".attention.output.dense."),
            (".sa_layer_norm.", ".attention.output.LayerNorm."),
            (".ffn.lin1.", ".intermediate.dense."),
            (".ffn.lin2.", ".output.dense."),
            (".output_layer_norm.", ".output.LayerNorm."),
        ),
        field_names={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
        },
        defaults={"hidden_act": "gelu"},
        fixed={**_PLAIN, "type_vocab_size": 0, "layer_norm_eps": 1e-12},
    ),
    "electra": Architecture(
        prefix="electra.",
        tensor_names=(("embeddings_project.", "embeddings.project."),),
        defaults={**_BERT.defaults, "embedding_size": 128},
        fixed={name: value for name, value in _PLAIN.items() if name != "embedding_size"},
    ),
    "mpnet": Architecture(
        prefix="mpnet.",
        tensor_names=(
            (".attention.attn.q.", ".attention.self.query."),
            (".attention.attn.k.", ".attention.self.key."),
            (".attention.attn.v.", ".attention.self.value."),
            (".attention.attn.o.", ".attention.output.dense."),
            (".attention.LayerNorm.", ".attention.output.LayerNorm."),
        ),
        field_names={"num_position_buckets": "relative_attention_num_buckets"},
        defaults={**_BERT.defaults, "num_position_buckets": 32},
        # transformers' MPNetEmbeddings has its padding index fixed.
        fixed={"embedding_size": None, "task_type_vocab_size": 0, "type_vocab_size": 0, "padding_position": 1},
    ),
    # Baidu's ERNIE 2 and 3: BERT with one more table, of which row 0 is used.
    "ernie": Architecture(
        prefix="ernie.",
        defaults={**_BERT.defaults, "task_type_vocab_size": 3},
        fixed={name: value for name, value in _PLAIN.items() if name != "task_type_vocab_size"},
    ),
}

# Tables that an encoder may be without: their rows may be 0.
_TABLES = ("type_vocab_size", "task_type_vocab_size", "num_position_buckets")


def read_config(raw: Mapping[str, Any], path: Path) -> EncoderConfig:
    """Read ``config.json``.

    Args:
        raw: Its content.
        path: Where it lies, for messages.

    Raises:
        CheckpointError: Every reason found why this encoder cannot be built.
    """
    kind = raw.get("model_type")
    problems = refusals(raw) + _unusual(raw)
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        way = "" if problems else f"; {OPTIMUM}"
        problems.insert(0, f"model_type is {kind!r}, built here are {', '.join(ARCHITECTURES)}{way}")
        raise CheckpointError(f"{str(path)!r} cannot be converted: {'; '.join(problems)}")
    values = _values(ARCHITECTURES[kind], raw)
    problems += _check_values(values)
    if not problems and values["hidden_size"] % values["num_attention_heads"]:
        problems.append(f"hidden_size {values['hidden_size']} is no multiple of num_attention_heads")
    if problems:
        raise CheckpointError(f"{str(path)!r} cannot be converted: {'; '.join(problems)}")
    return EncoderConfig(architecture=kind, **values)


def expected_tensors(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Name every tensor of an encoder, by BERT's names, with its shape."""
    hidden, inner, width = config.hidden_size, config.intermediate_size, config.embedding_size
    tables = {
        "embeddings.word_embeddings": (config.vocab_size, width),
        "embeddings.position_embeddings": (config.max_position_embeddings, width),
        "embeddings.token_type_embeddings": (config.type_vocab_size, width),
        "embeddings.task_type_embeddings": (config.task_type_vocab_size, width),
        "encoder.relative_attention_bias": (config.num_position_buckets, config.num_attention_heads),
    }
    linears = {"embeddings.project": (hidden, width)} if width != hidden else {}
    norms = {"embeddings.LayerNorm": (width,)}
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linears[f"{layer}.attention.{part}"] = (hidden, hidden)
        linears[f"{layer}.intermediate.dense"] = (inner, hidden)
        linears[f"{layer}.output.dense"] = (hidden, inner)
        norms[f"{layer}.attention.output.LayerNorm"] = norms[f"{layer}.output.LayerNorm"] = (hidden,)
    expected: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in tables.items() if shape[0]}
    for name, shape in (linears | norms).items():
        expected[f"{name}.weight"], expected[f"{name}.bias"] = shape, shape[:1]
    return expected


def refusals(raw: Mapping[str, Any]) -> list[str]:
    """Reasons why an encoder cannot be converted, whatever its architecture."""
    problems = []
    if "auto_map" in raw:
        problems.append(
            "it needs code of its own (auto_map), which is never run; convert a checkpoint of the same model "
            "without remote code, if there is one"
        )
    if "quantization_config" in raw:
        method = (
            raw["quantization_config"].get("quant_method", "") if isinstance(raw["quantization_config"], dict) else ""
        )
        problems.append(
            f"its weights are quantised already (quantization_config{f': {method}' if method else ''}); convert the "
            "checkpoint that they were made of"
        )
    generators = [name for name in map(str, raw.get("architectures") or ()) if name.endswith(_GENERATORS)]
    if generators or raw.get("is_decoder") or raw.get("is_encoder_decoder"):
        problems.append(f"it is a decoder ({', '.join(generators) or 'is_decoder'}); {DECODER}")
    return problems


def _unusual(raw: Mapping[str, Any]) -> list[str]:
    """Reasons that lie in what BERT's kin can be asked for."""
    problems = []
    for name, accepted, way in (
        ("position_embedding_type", "absolute", "--frontend optimum may export it"),
        ("add_cross_attention", False, "only encoders are built"),
    ):
        if raw.get(name, accepted) != accepted:
            problems.append(f"{name} is {raw[name]!r}, expected {accepted!r}; {way}")
    return problems


def _values(architecture: Architecture, raw: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(EncoderConfig):
        name = field.name
        if name in architecture.fixed:
            values[name] = architecture.fixed[name]
        elif name != "architecture":
            values[name] = raw.get(architecture.field_names.get(name, name), architecture.defaults.get(name))
    if values["embedding_size"] is None:
        values["embedding_size"] = values["hidden_size"]
    if "task_type_vocab_size" in architecture.defaults and not raw.get("use_task_id"):
        values["task_type_vocab_size"] = 0
    return values


def _check_values(values: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, value in values.items():
        if name == "hidden_act":
            if value not in ACTIVATIONS:
                problems.append(f"{name} is {value!r}, built here are {', '.join(ACTIVATIONS)}; {OPTIMUM}")
        elif name == "layer_norm_eps":
            if type(value) is not float or not 0 < value < math.inf:
                problems.append(f"{name} is {value!r}, expected a positive float")
        elif name in _TABLES or (name == "padding_position" and value is not None):
            if type(value) is not int or value < 0:
                problems.append(f"{name} is {value!r}, expected an int that is not negative")
        elif name != "padding_position" and (type(value) is not int or value <= 0):
            problems.append(f"{name} is {value!r}, expected a positive int")
    return problems
