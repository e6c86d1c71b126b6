"""GGUF files whose metadata or table of tensors say what cannot be, and scaled rotations."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from jrlhf.errors import ModelError, TokenizerError, UnsupportedModelError
from jrlhf.models.families import spec_from_config
from jrlhf.models.gguf_file import GGUFFile
from jrlhf.models.load import open_checkpoint
from jrlhf.models.tokenizer import load_tokenizer
from tests.models.conftest import tensors_of
from tests.models.gguf_cases import CONFIG, CONFIGS, write_gguf
from tests.models.test_gguf_sentencepiece import WORDS, encode_by_hand
from tests.models.test_gguf_sentencepiece import write as write_sentencepiece
from tests.models.test_tokenizer import WORDS as BYTE_WORDS
from tests.models.test_tokenizer import write_gguf as write_tokenizer

SCALING = "llama.rope.scaling."
YARN = {
    f"{SCALING}type": "yarn",
    f"{SCALING}factor": 4.0,
    f"{SCALING}original_context_length": 24,
}
UNSIGNED = 4294967295  # -1 without its sign


def write_model(path, metadata, arch="llama", **options):
    write_gguf(
        path, CONFIGS[arch], tensors_of(CONFIGS[arch]), metadata=metadata, arch=arch, **options
    )
    return path


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (YARN, {}),
        (YARN | {f"{SCALING}yarn_beta_fast": 16.0}, {"beta_fast": 16.0}),
        (YARN | {f"{SCALING}yarn_beta_slow": 2.0}, {"beta_slow": 2.0}),
        (YARN | {f"{SCALING}yarn_ext_factor": 1.0, f"{SCALING}yarn_log_multiplier": 0.0}, {}),
        (YARN | {f"{SCALING}yarn_ext_factor": -1.0, f"{SCALING}finetuned": True}, {}),
        (YARN | {f"{SCALING}attn_factor": 1.0}, {}),
    ],
)
def test_yarns_parameters_are_those_of_the_file(tmp_path, metadata, expected):
    config = open_checkpoint(write_model(tmp_path / "m.gguf", metadata)).config
    assert config["rope_parameters"] == expected | {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 24,
    }
    rope = spec_from_config(config).rope
    assert rope is not None
    assert (rope.beta_fast, rope.beta_slow) == (
        expected.get("beta_fast", 32.0),
        expected.get("beta_slow", 1.0),
    )


# As llama.cpp: without a type it is linear, a factor of 0 or 1 is none, and "none" has no factor.
@pytest.mark.parametrize(
    ("metadata", "factor"),
    [
        ({f"{SCALING}factor": 4.0}, 4.0),
        ({"llama.rope.scale_linear": 4.0}, 4.0),
        ({f"{SCALING}factor": 4.0, "llama.rope.scale_linear": 2.0}, 4.0),
        ({f"{SCALING}type": "linear", "llama.rope.scale_linear": 4.0}, 4.0),
        ({f"{SCALING}factor": 0.0}, None),
        ({f"{SCALING}type": "linear", f"{SCALING}factor": 1.0}, None),
        ({f"{SCALING}type": "none", f"{SCALING}factor": 4.0}, None),
        ({}, None),
    ],
)
def test_linear_scaling_needs_no_type(tmp_path, metadata, factor):
    config = open_checkpoint(write_model(tmp_path / "m.gguf", metadata)).config
    plain = {"rope_type": "default", "rope_theta": 500.0}
    scaled = {"rope_type": "linear", "factor": factor} if factor else {}
    assert config["rope_parameters"] == plain | scaled


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (YARN | {f"{SCALING}yarn_attn_factor": 1.5}, "yarn_attn_factor=1.5"),
        (YARN | {f"{SCALING}yarn_attn_factor": 1.0}, "yarn_attn_factor=1.0"),
        (YARN | {f"{SCALING}yarn_ext_factor": 0.5}, "yarn_ext_factor=0.5"),
        ({f"{SCALING}factor": 4.0, f"{SCALING}yarn_ext_factor": 1.0}, "'linear'"),
        (YARN | {f"{SCALING}yarn_log_multiplier": 0.5}, "yarn_log_multiplier=0.5"),
        ({f"{SCALING}attn_factor": 1.5}, r"scaling\.attn_factor=1.5"),
        ({f"{SCALING}alpha": 1000.0}, "alpha=1000.0"),
    ],
)
def test_scaling_that_would_change_numbers_is_refused_by_name(tmp_path, metadata, message):
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(write_model(tmp_path / "m.gguf", metadata))


def test_scaling_beside_stored_divisors_is_refused(tmp_path):
    freqs = {"rope_freqs.weight": np.ones(4, np.float32)}
    path = write_model(tmp_path / "m.gguf", {f"{SCALING}factor": 4.0}, extra=freqs)
    with pytest.raises(UnsupportedModelError, match=r"'linear' and rope_freqs\.weight"):
        open_checkpoint(path)


EPSILON = "llama.attention.layer_norm_rms_epsilon"
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.attention.head_count": 0}, "head_count=0, expected one whole number from 1"),
        ({"llama.attention.head_count": [4, 4]}, r"head_count=\[4, 4\], expected one whole"),
        ({"llama.context_length": "long"}, "context_length='long', expected one whole"),
        ({"llama.block_count": True}, "block_count=True, expected one whole"),
        ({"llama.embedding_length": UNSIGNED}, f"embedding_length={UNSIGNED}, expected"),
        ({"split.count": "x"}, r"split\.count='x', expected one whole"),
        ({"llama.expert_count": [8]}, r"expert_count=\[8\], expected one whole"),
        ({EPSILON: "small"}, "epsilon='small', expected a finite number of 0 or more"),
        ({EPSILON: [1e-5]}, r"epsilon=\[.*, expected a finite number"),
        ({EPSILON: NAN}, "epsilon=nan, expected"),
        ({EPSILON: INF}, "epsilon=inf, expected"),
        ({EPSILON: -1.0}, "epsilon=-1.0, expected"),
        ({"llama.rope.freq_base": 0.0}, "freq_base=0.0, expected a finite number above 0"),
        ({"llama.rope.freq_base": "many"}, "freq_base='many', expected a finite number"),
        ({f"{SCALING}type": ["yarn"]}, r"scaling\.type=\['yarn'\], expected a text"),
        ({f"{SCALING}factor": NAN}, r"scaling\.factor=nan, expected"),
        (YARN | {f"{SCALING}yarn_beta_fast": 0.0}, "yarn_beta_fast=0.0, expected"),
        ({"general.architecture": [1]}, r"architecture=\[1\], expected a text"),
        ({"tokenizer.ggml.bos_token_id": "one"}, "bos_token_id='one', expected one whole"),
        ({"tokenizer.ggml.eos_token_id": NAN}, "eos_token_id=nan, expected one whole"),
        ({"tokenizer.ggml.eot_token_id": [1]}, r"eot_token_id=\[1\], expected one whole"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_a_named_error(tmp_path, metadata, message):
    path = write_model(tmp_path / "m.gguf", metadata)
    with pytest.raises(ModelError, match=f"m.gguf .*{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"gemma3.attention.sliding_window_pattern": 0}, "pattern=0, expected one whole"),
        ({"gemma3.attention.sliding_window": -1}, "window=-1, expected one whole"),
        ({"gemma3.rope.freq_base_swa": [1.0]}, r"freq_base_swa=\[1.0\], expected a finite"),
        ({"gemma3.final_logit_softcapping": "30"}, "softcapping='30', expected a finite"),
    ],
)
def test_a_gemma_value_of_another_kind_is_a_named_error(tmp_path, metadata, message):
    path = write_model(tmp_path / "m.gguf", metadata, arch="gemma3")
    with pytest.raises(ModelError, match=message):
        open_checkpoint(path)


def test_what_no_key_names_is_still_an_error_of_ours(tmp_path):
    freqs = {"rope_freqs.weight": np.zeros(0, np.float32)}  # no largest divisor
    path = write_model(tmp_path / "m.gguf", {}, extra=freqs)
    with pytest.raises(ModelError, match=r"m\.gguf has metadata that make no config"):
        open_checkpoint(path)


@pytest.mark.parametrize("given", [-1, UNSIGNED, None])
def test_ids_outside_the_vocabulary_are_no_special_tokens(tmp_path, given):
    def ids(vocabulary):
        roles = ("bos", "padding", "eot", "unknown")
        beyond = vocabulary if given is None else given
        return {f"tokenizer.ggml.{role}_token_id": beyond for role in roles}

    found = open_checkpoint(write_model(tmp_path / "m.gguf", ids(CONFIG["vocab_size"])))
    assert found.generation_config == {"eos_token_id": 2}
    assert not {"bos_token_id", "pad_token_id"} & found.config.keys()

    path = write_tokenizer(tmp_path / "t.gguf", metadata=ids(len(BYTE_WORDS)))
    tokenizer = load_tokenizer(path)
    tokens = (tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert tokens == (None, None, None)
    assert tokenizer.eos_token_id == 2
    path = write_sentencepiece(tmp_path / "s.gguf", metadata=ids(len(WORDS)))
    tokenizer = load_tokenizer(path)
    assert tokenizer("the\u4e16")["input_ids"] == encode_by_hand("the\u4e16")
    assert tokenizer.backend_tokenizer.model.unk_token == WORDS[0]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"merges": ["t h", "t zzz"]}, r"merge 't zzz' .* no token: 'zzz', 'tzzz'\."),
        ({"merges": ["the"]}, "merge 'the' .* two tokens with a space"),
        ({"merges": [1, 2]}, r"merges=\[1, 2\], expected a list of texts"),
        ({"merges": "t h"}, "merges='t h', expected a list of texts"),
        ({"tokens": 3}, "tokens=3, expected a list of texts"),
        ({"tokens": [3, 4]}, r"tokens=\[3, 4\], expected a list of texts"),
        ({"token_type": 1}, "token_type=1, expected a list of numbers"),
        ({"token_type": ["a"]}, r"token_type=\['a'\], expected a list of numbers"),
        ({"model": ["gpt2"]}, r"model=\['gpt2'\], expected a text"),
        ({"pre": 3}, "pre=3, expected a text"),
        ({"unknown_token_id": "a"}, "unknown_token_id='a', expected one whole number"),
        ({"bos_token_id": NAN}, "bos_token_id=nan, expected one whole number"),
        ({"tokenizer.chat_template": ["a"]}, r"chat_template=\['a'\], expected a text"),
        ({"llama.context_length": "long"}, "context_length='long', expected one whole number"),
        ({"general.architecture": [1]}, r"architecture=\[1\], expected a text"),
    ],
)
def test_a_tokenizers_value_of_another_kind_is_a_named_error(tmp_path, metadata, message):
    metadata = {k if "." in k else f"tokenizer.ggml.{k}": v for k, v in metadata.items()}
    path = write_tokenizer(tmp_path / "t.gguf", metadata=metadata)
    with pytest.raises(TokenizerError, match=f"t.gguf .*{message}"):
        load_tokenizer(path)


def test_scores_that_are_no_list_are_a_named_error(tmp_path):
    path = write_sentencepiece(tmp_path / "s.gguf", metadata={"tokenizer.ggml.scores": 1.0})
    with pytest.raises(TokenizerError, match=r"scores=1.0, expected a list of numbers"):
        load_tokenizer(path)


def test_what_no_key_of_a_tokenizer_names_is_still_an_error_of_ours(tmp_path):
    metadata = {
        "tokenizer.ggml.tokens": ["a", "b", "ab", "$C"],  # templates know no $C
        "tokenizer.ggml.token_type": [1, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 3,
    }
    path = write_tokenizer(tmp_path / "t.gguf", metadata=metadata, add_bos=True)
    with pytest.raises(TokenizerError, match=r"t\.gguf has metadata that make no tokenizer"):
        load_tokenizer(path)


@pytest.mark.parametrize("alignment", [1, 7, 24, "32", True])
def test_an_alignment_that_none_can_be_is_a_named_error(tmp_path, alignment):
    path = write_model(tmp_path / "m.gguf", {"general.alignment": alignment})
    with pytest.raises(ModelError, match=f"alignment={alignment!r}, expected a power of two"):
        GGUFFile(path)


def moved(content, name, offset):
    """The file with another offset in its row: dimensions, their sizes, type, offset."""
    at = content.index(name) + len(name)
    (dimensions,) = struct.unpack_from("<I", content, at)
    at += 4 + 8 * dimensions + 4
    (before,) = struct.unpack_from("<Q", content, at)
    return content[:at] + struct.pack("<Q", offset(before)) + content[at + 8 :], before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda at: 0, "lies at offset 0, expected"),
        (lambda at: at - 32, "lies at offset .*, expected"),
        (lambda at: at + 4, "lies at offset .*general.alignment=32"),
        (lambda at: at + 32, "lies at offset .*, expected"),
    ],
)
def test_an_offset_that_lies_is_a_named_error(tmp_path, change, message):
    path = write_model(tmp_path / "m.gguf", {})
    content, _ = moved(path.read_bytes(), b"blk.1.ffn_up.weight", change)
    path.write_bytes(content + bytes(64))
    with pytest.raises(ModelError, match=message):
        GGUFFile(path)


def test_tensors_may_lie_in_another_order_than_their_rows(tmp_path):
    path = write_model(tmp_path / "m.gguf", {})
    names = ("blk.0.attn_k.weight", "blk.0.attn_v.weight")
    before = GGUFFile(path).tensors
    content, first = moved(path.read_bytes(), names[0].encode(), lambda at: at)
    content, second = moved(content, names[1].encode(), lambda at: first)
    path.write_bytes(moved(content, names[0].encode(), lambda at: second)[0])
    after = GGUFFile(path).tensors
    for one, other in (names, names[::-1]):
        np.testing.assert_array_equal(after[one].data, before[other].data)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"),
        (b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"),
    ],
)
def test_a_name_that_is_there_twice_is_a_named_error(tmp_path, old, new):
    path = write_model(tmp_path / "m.gguf", {})
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ModelError, match=f"{new.decode()} twice"):
        GGUFFile(path)
