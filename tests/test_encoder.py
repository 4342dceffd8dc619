from __future__ import annotations

import dataclasses
import multiprocessing
import pickle
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3e import Encoder, InferenceError, InputError, StartError, TruncationWarning
from m3e.manifest import Manifest, encode_array

# One text alone and in any batch, for unit vectors.
INVARIANCE = 5e-7


def unit(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    rows: np.ndarray[Any, Any] = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_text_alone_equals_the_text_in_any_batch(
    tiny_encoder: Encoder, sentences: list[str], data: st.DataObject
) -> None:
    texts = data.draw(st.lists(st.sampled_from(sentences) | st.text(max_size=40), min_size=1, max_size=24))
    batch_size = data.draw(st.none() | st.integers(1, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        together = unit(tiny_encoder.encode(texts, batch_size=batch_size))
        alone = unit(np.stack([tiny_encoder.encode(text) for text in texts]))
    assert np.abs(together - alone).max() <= INVARIANCE


def test_a_text_alone_equals_the_text_in_any_batch_of_a_trained_model(
    minilm_encoder: Encoder, sentences: list[str]
) -> None:
    texts = [text for text in sentences if len(text) < 200][::8]
    together = minilm_encoder.encode(texts)
    alone = np.stack([minilm_encoder.encode(text) for text in texts])
    assert np.abs(together - alone).max() <= INVARIANCE


def test_order_and_duplicates(tiny_encoder: Encoder, sentences: list[str]) -> None:
    texts = sentences[:50]
    order = np.random.default_rng(0).permutation(50)
    forward, shuffled = tiny_encoder.encode(texts), tiny_encoder.encode([texts[i] for i in order])
    np.testing.assert_allclose(unit(forward[order]), unit(shuffled), atol=INVARIANCE)
    twice = tiny_encoder.encode([texts[0], texts[1], texts[0]])
    np.testing.assert_allclose(unit(twice[0]), unit(twice[2]), atol=INVARIANCE)


@pytest.mark.parametrize(
    ("sentences", "shape"),
    [
        pytest.param("你好", (64,), id="str"),
        pytest.param("", (64,), id="empty text"),
        pytest.param(["你好"], (1, 64), id="list of one"),
        pytest.param(["a", "b"], (2, 64), id="list"),
        pytest.param(np.array(["a"]), (1, 64), id="array"),
        pytest.param([], (0, 64), id="empty list"),
        pytest.param((), (0, 64), id="empty tuple"),
    ],
)
def test_shapes(tiny_encoder: Encoder, sentences: Any, shape: tuple[int, ...]) -> None:
    embeddings = tiny_encoder.encode(sentences)
    assert embeddings.shape == shape
    assert embeddings.dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sentences": ["a", None]}, r"sentences\[1\] is NoneType, expected str"),
        ({"sentences": ["a", b"b"]}, r"sentences\[1\] is bytes"),
        ({"sentences": b"abc"}, "bytes.*decode"),
        ({"sentences": None}, "NoneType"),
        ({"sentences": 3}, "int"),
        ({"sentences": {"a": 1}}, "dict"),
        ({"sentences": (text for text in "ab")}, "generator.*encode_iter"),
        ({"sentences": [["a", "b"]]}, r"sentences\[0\] is list"),
        ({"sentences": ["good", "\ud800"]}, "text 1 is not valid Unicode"),
        ({"sentences": "a", "batch_size": 0}, "batch_size is 0"),
        ({"sentences": "a", "batch_size": "8"}, "batch_size is '8', expected an integer"),
        ({"sentences": "a", "truncate_dim": 65}, "truncate_dim is 65, expected 1 to 64"),
        ({"sentences": "a", "truncate_dim": 8.0}, r"truncate_dim is 8\.0, expected an integer"),
        ({"sentences": "a", "truncate_dim": True}, "truncate_dim is True, expected an integer"),
        ({"sentences": "a", "prompt": 3}, "prompt is 3, expected a str"),
        ({"sentences": "a", "precision": "int4"}, "unknown precision 'int4'"),
        ({"sentences": "a", "prompt_name": "query"}, "no prompt named 'query'"),
        ({"sentences": "a", "output_value": "token_embeddings"}, "output_value"),
        ({"sentences": "a", "precision": "int8", "truncate_dim": 8, "normalize_embeddings": True}, "no ranges"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_used_is_named(tiny_encoder: Encoder, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_encoder.encode(**arguments)


def test_unknown_arguments_are_errors(tiny_encoder: Encoder) -> None:
    with pytest.raises(TypeError, match="normalise"):
        tiny_encoder.encode("a", normalise=True)  # type: ignore[call-arg]


def test_normalise_and_truncate(tiny_encoder: Encoder) -> None:
    full = tiny_encoder.encode(["你好", "hello"])
    np.testing.assert_allclose(tiny_encoder.encode(["你好", "hello"], truncate_dim=16), full[:, :16], atol=1e-6)
    of_numpy: Any = np.int32(16)
    np.testing.assert_array_equal(tiny_encoder.encode("你好", truncate_dim=of_numpy), full[0, :16])
    short = tiny_encoder.encode(["你好", "hello"], truncate_dim=16, normalize_embeddings=True)
    np.testing.assert_allclose(short, unit(full[:, :16]), atol=1e-6)


@pytest.mark.parametrize(("precision", "dtype"), [("int8", np.int8), ("uint8", np.uint8)])
def test_quantised_output_keeps_the_angle_and_does_not_depend_on_neighbours(
    minilm_encoder: Encoder, sentences: list[str], precision: Any, dtype: Any
) -> None:
    texts = [text for text in sentences if len(text) < 60][::10]
    exact = minilm_encoder.encode(texts)
    quantised = minilm_encoder.encode(texts, precision=precision)
    assert quantised.dtype == dtype
    low, high = np.frombuffer(  # the ranges that the manifest fixes
        __import__("base64").b64decode(minilm_encoder.manifest.unit_embedding_ranges), dtype="<f4"
    ).reshape(2, -1)
    offset = 0 if precision == "uint8" else 128
    restored = (quantised.astype(np.float32) + offset + 0.5) * (high - low) / 255 + low
    assert (unit(restored) * exact).sum(axis=1).min() > 0.999
    alone = minilm_encoder.encode(texts[3], precision=precision)
    assert np.abs(alone.astype(int) - quantised[3]).max() <= 1


def test_prompts(tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tiny_encoder.manifest.model.prompts
    monkeypatch.setitem(prompts, "query", "为这个句子生成表示：")
    monkeypatch.setitem(prompts, "passage", "文档：")
    plain = tiny_encoder.encode(["为这个句子生成表示：你好", "文档：你好", "你好"])
    for embedding, expected in [
        (tiny_encoder.encode_query("你好"), plain[0]),
        (tiny_encoder.encode("你好", prompt_name="query"), plain[0]),
        (tiny_encoder.encode("你好", prompt="文档："), plain[1]),
        (tiny_encoder.encode_document("你好"), plain[1]),
        (tiny_encoder.encode("你好"), plain[2]),
    ]:
        np.testing.assert_allclose(unit(embedding), unit(expected), atol=INVARIANCE)


def test_truncation_is_reported_and_keeps_the_closing_token(tiny_encoder: Encoder) -> None:
    with pytest.warns(TruncationWarning, match=r"1 of 2 texts are longer than 512 tokens.*text 1, with at least 602"):
        long = tiny_encoder.encode(["短", "长" * 600])[1]
    exact = tiny_encoder.encode("长" * 510)
    np.testing.assert_allclose(unit(long), unit(exact), atol=INVARIANCE)
    assert tiny_encoder.count_tokens(["长" * 600]).tolist() == [602]
    assert tiny_encoder.count_tokens(["长" * 20_000]).tolist() == [20_002]
    assert 512 < tiny_encoder.count_tokens(["长" * 20_000], exact=False)[0] < 1000


@pytest.mark.parametrize("sentences", ["长" * 600, ["长" * 600], ["长" * 600] * 3], ids=["text", "list", "several"])
def test_truncation_is_warned_of_where_encode_was_called(tiny_encoder: Encoder, sentences: str | list[str]) -> None:
    with pytest.warns(TruncationWarning) as found:
        tiny_encoder.encode(sentences)
    assert [warning.filename for warning in found] == [__file__]


def test_max_seq_length_can_be_lowered(tiny_bundle: Path) -> None:
    encoder = Encoder(tiny_bundle)
    encoder.max_seq_length = 10
    assert encoder.tokenize("长" * 50)["input_ids"].shape == (1, 10)
    with pytest.raises(InputError, match="max_seq_length is 513, expected 3 to 512"):
        encoder.max_seq_length = 513


def test_encode_iter_holds_one_window(tiny_encoder: Encoder) -> None:
    taken = 0

    def stream() -> Iterator[str]:
        nonlocal taken
        for i in range(100):
            taken += 1
            yield f"text {i}"

    vectors = tiny_encoder.encode_iter(stream(), window=8)
    first = next(vectors)
    assert taken == 8
    rest = list(vectors)
    assert len(rest) == 99
    expected = tiny_encoder.encode([f"text {i}" for i in range(100)])
    np.testing.assert_allclose(unit(np.stack([first, *rest])), unit(expected), atol=INVARIANCE)


def test_tokenize_gives_the_graph_its_inputs(tiny_encoder: Encoder) -> None:
    inputs = tiny_encoder.tokenize(["你好", "a"])
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert inputs["input_ids"].shape == (2, 4)
    assert tiny_encoder.tokenize([])["input_ids"].shape == (0, 0)


def test_many_threads_share_an_encoder(tiny_encoder: Encoder, sentences: list[str]) -> None:
    texts = sentences[:64]
    expected = tiny_encoder.encode(texts)
    with ThreadPoolExecutor(16) as pool:
        for embedding, row in zip(pool.map(tiny_encoder.encode, texts), expected, strict=True):
            np.testing.assert_allclose(unit(embedding), unit(row), atol=INVARIANCE)


def _embed(encoder: Encoder, texts: list[str], queue: Any) -> None:
    queue.put(encoder.encode(texts))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_can_use_it(tiny_bundle: Path, method: str) -> None:
    encoder = Encoder(tiny_bundle)
    expected = encoder.encode(["你好"])
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_embed, args=(encoder, ["你好"], queue))
    child.start()
    try:
        np.testing.assert_array_equal(queue.get(timeout=60), expected)
        child.join(30)
        assert child.exitcode == 0
    finally:
        child.kill()


def test_pickle(tiny_bundle: Path) -> None:
    encoder = Encoder(tiny_bundle, num_threads=1)
    copy = pickle.loads(pickle.dumps(encoder))
    assert repr(copy) == repr(encoder)
    np.testing.assert_array_equal(copy.encode("你好"), encoder.encode("你好"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"precision": "int3"}, "BundleError", "no int3 graph for cpu, only fp32 for cpu"),
        ({"device": "tpu"}, "InputError", "device is 'tpu'"),
        ({"num_threads": 0}, "InputError", "num_threads is 0"),
        ({"num_threads": "2"}, "InputError", "num_threads is '2'"),
        ({"max_memory_mb": 0.5}, "InputError", "max_memory_mb is 0.5"),
    ],
    ids=["precision", "device", "threads", "threads as text", "memory"],
)
def test_opening_with_wrong_arguments(tiny_bundle: Path, arguments: dict[str, Any], error: str, message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        Encoder(tiny_bundle, **arguments)
    assert type(caught.value).__name__ == error


@pytest.mark.parametrize("field", ["golden_embeddings", "input_ids"])
def test_the_canary_refuses_another_outcome(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    import dataclasses

    original = Manifest.from_bytes

    def altered(data: bytes) -> Manifest:
        manifest = original(data)
        if field == "input_ids":
            golden = (dataclasses.replace(manifest.golden[0], input_ids=(2, 1, 3)), *manifest.golden[1:])
            return dataclasses.replace(manifest, golden=golden)
        noise = np.random.default_rng(0).standard_normal((len(manifest.golden), 64), dtype=np.float32)
        graph = dataclasses.replace(manifest.graphs[0], golden_embeddings=encode_array(noise))
        return dataclasses.replace(manifest, graphs=(graph,))

    monkeypatch.setattr(Manifest, "from_bytes", altered)
    with pytest.raises(StartError, match="other ids" if field == "input_ids" else "gives other vectors"):
        Encoder(tiny_bundle)


def test_values_that_are_not_finite_never_leave(tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def run(self, *_: Any) -> list[np.ndarray[Any, Any]]:
            return [np.full((1, 64), np.nan, dtype=np.float32)]

    for session in ("_alone", "_beside"):
        monkeypatch.setattr(tiny_encoder._running.session, session, Broken())
    with pytest.raises(InferenceError, match="not finite"):
        tiny_encoder.encode("a")


@pytest.mark.parametrize(("num_threads", "sizes"), [(1, [10, 11, 11]), (2, [8, 8, 8, 8])])
def test_a_call_is_split_over_the_threads_and_what_one_thread_embeds_is_not(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int, sizes: list[int]
) -> None:
    encoder = Encoder(tiny_bundle, num_threads=num_threads)
    session, seen = encoder._running.session_here(), list[int]()
    run = session.run

    def counting(input_ids: list[list[int]], **options: Any) -> np.ndarray[Any, Any]:
        seen.append(len(input_ids))
        return run(input_ids, **options)

    monkeypatch.setattr(session, "run", counting)
    encoder.encode(["天" * 30] * 32)
    assert sorted(seen) == sizes
    seen.clear()
    encoder.embed([[2] * 32] * 32)  # one after the other, in the thread that calls
    assert sorted(seen) == [10, 11, 11]


def test_a_graph_that_cannot_be_opened_prints_nothing(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Onnxruntime's own fall-back writes to stdout, where a program's answers go."""
    import onnxruntime

    def no_memory(*_: object) -> None:
        raise RuntimeError("pthread_create failed")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", no_memory)
    with pytest.raises(StartError, match="cannot open the graph: pthread_create failed"):
        Encoder(tiny_bundle)
    assert capfd.readouterr() == ("", "")


def test_a_text_where_a_list_belongs_is_refused(tiny_encoder: Encoder) -> None:
    """Otherwise its characters would be the texts."""
    for call in (
        tiny_encoder.count_tokens,
        tiny_encoder.tokenize_batch,
        lambda text: list(tiny_encoder.encode_iter(text)),
    ):
        with pytest.raises(InputError, match="sentences is a str"):
            call("天气")
    with pytest.raises(InputError, match=r"max_seq_length is 10\.5"):
        tiny_encoder.max_seq_length = 10.5  # type: ignore[assignment]


def test_a_child_does_not_take_another_bundle_from_the_folder(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    encoder = Encoder(folder)
    (folder / "manifest.json").write_bytes(dataclasses.replace(encoder.manifest, space_id="0" * 16).to_bytes())
    encoder._running._process = -1  # as a forked child finds it
    with pytest.raises(StartError, match="holds another bundle than before the fork"):
        encoder.encode("a")
