"""glassllm's own files, against its maths written out in numpy."""

from __future__ import annotations

import functools
import itertools
import json
import re
import unicodedata

import jax
import numpy as np
import pytest

from jrlhf.errors import MissingFileError, MissingWeightError, ModelError
from jrlhf.models.glassllm import SPECIALS, unpermute_rows
from jrlhf.models.load import load_pretrained
from jrlhf.models.save import save_pretrained
from jrlhf.models.tokenizer import load_tokenizer
from tests.models.plain import encode_text

SIZES = {"vocab_size": 12, "d_model": 8, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1}
CONFIG = {**SIZES, "max_len": 16, "rope_base": 100.0, "eps": 1e-6, "init_std": 0.02}
ALPHABET = ["a", "b", "▁", "\n"]
MERGES = [["a", "b"], ["▁", "ab"], ["b", "b"], ["ab", "ab"]]


def arrays_of(config):
    """Random weights in glassllm's own names and shapes: (in, out)."""
    rng = np.random.default_rng(0)
    d, h, k = config["d_model"], config["n_heads"], config["n_kv_heads"]
    e, f = d // h, int(8 * d / 3)
    shapes = {"E": (config["vocab_size"], d), "norm_f.gamma": (d,)}
    for i in range(config["n_layers"]):
        shapes |= {
            f"blocks.{i}.norm1.gamma": (d,),
            f"blocks.{i}.norm2.gamma": (d,),
            f"blocks.{i}.attn.W_Q": (d, h * e),
            f"blocks.{i}.attn.W_K": (d, k * e),
            f"blocks.{i}.attn.W_V": (d, k * e),
            f"blocks.{i}.attn.W_O": (h * e, d),
            f"blocks.{i}.ffn.W1": (d, f),
            f"blocks.{i}.ffn.W3": (d, f),
            f"blocks.{i}.ffn.W2": (f, d),
        }
    return {name: rng.normal(0, 0.5, shape).astype(np.float16) for name, shape in shapes.items()}


def write(directory, arrays, config=CONFIG):
    directory.mkdir(exist_ok=True)
    np.savez(directory / "xx.npz", __config__=np.array(json.dumps(config)), **arrays)
    tokenizer = {"version": 1, "alphabet": ALPHABET, "merges": MERGES}
    (directory / "xx.tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


def rotate(x, theta):
    """glassllm's rope: neighbours (2i, 2i+1) are a pair. x [h s e]."""
    s, e = x.shape[1:]
    angle = np.outer(np.arange(s), theta ** (-2.0 * np.arange(e // 2) / e))
    even, odd = x[..., ::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., ::2] = even * np.cos(angle) - odd * np.sin(angle)
    out[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
    return out


def forward(arrays, config, ids):
    """Logits of one row in float64, from glassllm's description."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    h, k = config["n_heads"], config["n_kv_heads"]
    s, e = len(ids), config["d_model"] // h

    def norm(x, gamma):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["eps"]) * gamma

    def heads(x, n):
        return x.reshape(s, n, e).swapaxes(0, 1)

    x = w["E"][ids]
    for i in range(config["n_layers"]):
        b = f"blocks.{i}."
        y = norm(x, w[b + "norm1.gamma"])
        q = rotate(heads(y @ w[b + "attn.W_Q"], h), config["rope_base"])
        key = rotate(heads(y @ w[b + "attn.W_K"], k), config["rope_base"]).repeat(h // k, 0)
        value = heads(y @ w[b + "attn.W_V"], k).repeat(h // k, 0)
        scores = q @ key.swapaxes(1, 2) / np.sqrt(e)
        scores[:, np.triu(np.ones((s, s), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weights / weights.sum(-1, keepdims=True) @ value
        x = x + mixed.swapaxes(0, 1).reshape(s, h * e) @ w[b + "attn.W_O"]
        y = norm(x, w[b + "norm2.gamma"])
        gate = y @ w[b + "ffn.W1"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w[b + "ffn.W3"])) @ w[b + "ffn.W2"]
    return norm(x, w["norm_f.gamma"]) @ w["E"].T


@functools.partial(jax.jit, static_argnums=0)
def logits_of(net, params, ids):
    return net.hidden(params, ids[None])[0] @ net.head(params)


def our_logits(directory, ids):
    net, params, _ = load_pretrained(directory)
    return np.asarray(logits_of(net, params, ids))


def test_logits_are_those_of_glassllms_own_maths(tmp_path):
    arrays = arrays_of(CONFIG)
    ids = np.random.default_rng(1).integers(0, 12, 16)
    expected = forward(arrays, CONFIG, ids)
    logits = our_logits(write(tmp_path / "m", arrays), ids)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.assets
def test_the_real_models_logits_are_those_of_glassllms_own_maths(glassllm):
    with np.load(glassllm / "en.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    config = json.loads(str(arrays.pop("__config__")))
    ids = np.random.default_rng(1).integers(4, 1024, config["max_len"])
    expected = forward(arrays, config, ids)
    np.testing.assert_allclose(
        our_logits(glassllm, ids), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def test_unpermuting_brings_neighbours_half_a_head_apart():
    rows = unpermute_rows(2, 12)
    assert sorted(rows) == list(range(12))
    for head in rows.reshape(2, 2, 3):
        np.testing.assert_array_equal(head[1], head[0] + 1)
        assert all(head[0] % 2 == 0)


def test_it_is_saved_as_a_hugging_face_directory_and_comes_back_equal(tmp_path):
    origin = write(tmp_path / "m", arrays_of(CONFIG))
    net, params, source = load_pretrained(origin)
    save_pretrained(tmp_path / "s", net, params, source=source)
    ids = np.arange(12).repeat(2)[:16]
    np.testing.assert_array_equal(our_logits(tmp_path / "s", ids), our_logits(origin, ids))
    ours, theirs = load_tokenizer(tmp_path / "s"), load_tokenizer(origin)
    text = "ab abb\n  abab a<eos>"
    assert encode_text(ours, text) == encode_text(theirs, text)
    assert (ours.eos_token_id, ours.model_max_length) == (3, 16)
    assert json.loads((tmp_path / "s" / "generation_config.json").read_text()) == {
        "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip


def test_missing_and_unexpected_arrays_are_listed(tmp_path):
    arrays = arrays_of(CONFIG)
    del arrays["blocks.1.attn.W_K"]
    arrays["blocks.2.attn.W_K"] = arrays["blocks.0.attn.W_K"]
    with pytest.raises(MissingWeightError) as caught:
        load_pretrained(write(tmp_path / "m", arrays))
    assert "missing: model.layers.1.self_attn.k_proj.weight" in str(caught.value)
    assert "unexpected: blocks.2.attn.W_K" in str(caught.value)


def test_other_npz_files_are_named_errors(tmp_path):
    directory = write(tmp_path / "m", arrays_of(CONFIG))
    np.savez(directory / "xx.npz", x=np.zeros(3))
    with pytest.raises(ModelError, match=r"xx\.npz is not a glassllm model"):
        load_pretrained(directory)
    (directory / "xx.npz").write_bytes(b"PK\3\4 nothing")
    with pytest.raises(ModelError, match=r"xx\.npz is not a glassllm model"):
        load_pretrained(directory)
    (directory / "yy.npz").touch()
    (directory / "yy.tokenizer.json").touch()
    with pytest.raises(MissingFileError, match=r"xx\.npz, yy\.npz"):
        load_pretrained(directory)


def test_pickled_arrays_are_refused(tmp_path):
    directory = write(tmp_path / "m", arrays_of(CONFIG))
    np.savez(directory / "xx.npz", __config__=np.array([{"vocab_size": 1}], dtype=object))
    with pytest.raises(ModelError, match="allow_pickle=False"):
        load_pretrained(directory)


def encode_by_hand(text, alphabet, merges):
    """glassllm's character BPE: the earliest merge everywhere, until none applies."""
    vocab = {
        word: i
        for i, word in enumerate([*SPECIALS, *alphabet, *(a + b for a, b in merges)])
    }  # fmt: skip
    ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
    text = unicodedata.normalize("NFC", text).replace(" ", "▁")
    ids = []
    for chunk in re.findall(r"\n|▁*[^▁\n]+|▁+", text):
        symbols = list(chunk)
        while True:
            pairs = [pair for pair in itertools.pairwise(symbols) if pair in ranks]
            if not pairs:
                break
            best, out = min(pairs, key=ranks.__getitem__), []
            while symbols:
                joined = tuple(symbols[:2]) == best
                out.append("".join(symbols[: 1 + joined]))
                del symbols[: 1 + joined]
            symbols = out
        ids += [vocab.get(symbol, SPECIALS.index("<unk>")) for symbol in symbols]
    return ids


TEXTS = [
    "",
    "ab",
    " abab  ab\n\n ab ",
    "bbb ééa\u0301 <eos>ab<pad>",
    "▁ab ▁",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_the_algorithm_by_hand(tmp_path, text):
    tokenizer = load_tokenizer(write(tmp_path / "m", arrays_of(CONFIG)))
    assert encode_text(tokenizer, text) == encode_by_hand(text, ALPHABET, MERGES)


@pytest.mark.assets
def test_the_real_tokenizer_is_the_algorithm_by_hand_and_decodes_what_it_encodes(glassllm):
    tokenizer = load_tokenizer(glassllm)
    data = json.loads((glassllm / "en.tokenizer.json").read_text())
    text = (
        "Alice was beginning to get very tired of sitting by her sister on the bank,\n"
        "and of having nothing to do: “and what is the use of a book,” thought Alice,\n\n"
        "  “without pictures or conversations?” 12345 — [Exeunt.]"
    )
    ids = encode_text(tokenizer, text)
    assert ids == encode_by_hand(text, data["alphabet"], data["merges"])
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 1024
