"""Encoders: attention against float64 oracles, padding, sharding, frozen layers, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jrlhf.auto import (
    AutoModelForCausalLM,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSequenceClassification,
    Model,
)
from jrlhf.errors import MissingWeightError, ModelError
from jrlhf.models.build import partition
from jrlhf.models.build_encoder import EncoderNet
from jrlhf.models.deberta import position_scores, table_rows
from jrlhf.models.encoder_attention import Reach, attend_both_ways
from jrlhf.models.encoder_spec import RelativeSpec
from jrlhf.models.load import load_pretrained
from tests.models.conftest import tensors_of, write_hf

DEBERTA: dict[str, Any] = {
    "model_type": "deberta-v2",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "relative_attention": True,
    "position_buckets": 8,
    "max_relative_positions": -1,
    "pos_att_type": "p2c|c2p",
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "conv_kernel_size": 3,
    "num_labels": 1,
}
MODERNBERT: dict[str, Any] = {
    "model_type": "modernbert",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "local_attention": 6,
    "num_labels": 1,
}
BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "num_labels": 1,
}


def bucket_by_hand(distance: int, relative: RelativeSpec) -> int:
    """The bucket of one distance, in float64 from the formula."""
    mid = relative.buckets // 2
    if not relative.buckets or abs(distance) <= mid:
        return distance
    ratio = math.log(abs(distance) / mid) / math.log((relative.max_distance - 1) / mid)
    # A distance on a border is an exact whole number that rounding must not push over.
    far = math.ceil(ratio * (mid - 1) - 1e-6) + mid
    return int(math.copysign(far, distance))


def disentangled_by_hand(
    q: np.ndarray,
    k: np.ndarray,
    keys: np.ndarray | None,
    queries: np.ndarray | None,
    relative: RelativeSpec,
) -> np.ndarray:
    """He et al. 2021, equation 4: every pair of tokens on its own, float64 [b h s s].

    `keys` and `queries` are the projected tables [2 span, h, e], not yet taken by distance.
    """
    b, s, h, _ = q.shape
    out = np.zeros((b, h, s, s))
    for i in range(s):
        for j in range(s):
            place = bucket_by_hand(i - j, relative) + relative.span
            place = min(max(place, 0), 2 * relative.span - 1)
            for n in range(h):
                if keys is not None:
                    out[:, n, i, j] += q[:, i, n] @ keys[place, n]
                if queries is not None:
                    out[:, n, i, j] += k[:, j, n] @ queries[place, n]
    return out


@pytest.mark.parametrize(
    "relative",
    [
        RelativeSpec(terms=("c2p", "p2c"), buckets=8, max_distance=40),
        RelativeSpec(terms=("c2p",), buckets=4, max_distance=9),
        RelativeSpec(terms=("p2c",), max_distance=5),
    ],
    ids=["both, buckets", "c2p, few buckets", "p2c, clipped"],
)
def test_disentangled_scores_equal_a_float64_oracle(relative: RelativeSpec) -> None:
    draw = np.random.default_rng(0)
    q, k = draw.normal(size=(2, 2, 19, 3, 5))
    tables = draw.normal(size=(2, 2 * relative.span, 3, 5))
    both = [
        table if term in relative.terms else None
        for table, term in zip(tables, ("c2p", "p2c"), strict=True)
    ]
    rows = table_rows(relative, 19)
    taken = [None if t is None else jnp.asarray(t[rows], jnp.float32) for t in both]
    ours = position_scores(
        jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32), *taken, dtype="float32"
    )
    np.testing.assert_allclose(ours, disentangled_by_hand(q, k, *both, relative), atol=2e-5)


@pytest.mark.parametrize("buckets", [0, 256])
def test_buckets_of_the_real_size_follow_the_formula(buckets: int) -> None:
    relative = RelativeSpec(buckets=buckets, max_distance=512)
    wanted = [bucket_by_hand(d, relative) + relative.span for d in range(-700, 701)]
    np.testing.assert_array_equal(
        table_rows(relative, 701), np.clip(wanted, 0, 2 * relative.span - 1)
    )


def attention_by_hand(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, segments: np.ndarray, window: int | None
) -> np.ndarray:
    """Softmax attention row by row, float64."""
    out = np.zeros_like(q)
    b, s, h, _ = q.shape
    for row in range(b):
        for i in range(s):
            near = np.abs(np.arange(s) - i) <= (s if window is None else window)
            read = near & (segments[row] == segments[row, i])
            for n in range(h):
                scores = k[row, read, n] @ q[row, i, n]
                weights = np.exp(scores - scores.max())
                out[row, i, n] = weights @ v[row, read, n] / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("block", [64, 5])
def test_attention_reads_its_window_and_document_in_one_block_and_in_several(
    window: int | None, block: int
) -> None:
    draw = np.random.default_rng(0)
    q, k, v = draw.normal(size=(3, 2, 13, 2, 4))
    segments = np.array([[1] * 6 + [2] * 7, [1] * 9 + [0] * 4])
    reach = Reach(jnp.asarray(segments), 3, jnp.asarray(window is not None))

    def run(q: jax.Array) -> jax.Array:
        return attend_both_ways(
            q, jnp.asarray(k, "float32"), jnp.asarray(v, "float32"), reach,
            dtype="float32", block=block,
        )  # fmt: skip

    wanted = attention_by_hand(q, k, v, segments, window)
    np.testing.assert_allclose(run(jnp.asarray(q, "float32")), wanted, atol=2e-6)


def scored(net: EncoderNet, params: Any, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    @jax.jit
    def run(params: Any, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        return net.scores(params, net.hidden(params, ids, lengths=lengths), lengths)

    return np.asarray(run(params, jnp.asarray(ids), jnp.asarray(lengths)))


def made(config: dict[str, Any], tmp_path: Path, **choices: Any) -> tuple[Any, Any]:
    path = write_hf(tmp_path / config["model_type"], config, tensors_of(config))
    net, params, _ = load_pretrained(path, head="classifier", **choices)
    return net, params


IDS = np.random.default_rng(3).integers(3, 40, (2, 20)).astype(np.int32)
LENGTHS = np.array([20, 11], np.int32)


def test_an_empty_row_has_a_finite_score_and_padding_no_effect(tmp_path: Path) -> None:
    net, params = made(MODERNBERT | {"classifier_pooling": "mean"}, tmp_path)
    lengths = np.array([11, 0], np.int32)
    one = scored(net, params, IDS, lengths)
    other = np.where(np.arange(20) < 11, IDS, 7)
    assert np.isfinite(one).all()
    np.testing.assert_array_equal(one[0], scored(net, params, other, lengths)[0])


@pytest.mark.parametrize("config", [DEBERTA, MODERNBERT], ids=lambda c: c["model_type"])
def test_scores_are_the_same_on_a_mesh_that_cuts_the_weights(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config = config | {"intermediate_size": 32}
    path = write_hf(tmp_path / "m", config, tensors_of(config))
    one = AutoModelForSequenceClassification.from_pretrained(path)
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    cut = AutoModelForSequenceClassification.from_pretrained(path, mesh=mesh)
    kernel = cut.params["layers"]["mlp"]["down"]["kernel"]
    shard = kernel.addressable_shards[0].data.shape
    assert shard == (kernel.shape[0], kernel.shape[1] // 2, kernel.shape[2] // 2)
    for name, leaf in jax.tree_util.tree_leaves_with_path(one.params):
        other = cut.params
        for key in name:
            other = other[key.key]
        np.testing.assert_array_equal(leaf, other)
    mask = (np.arange(20) < LENGTHS[:, None]).astype(np.int32)
    np.testing.assert_allclose(cut(IDS, mask).logits, one(IDS, mask).logits, atol=1e-5)


def test_frozen_lower_layers_get_no_gradient_and_change_no_score(tmp_path: Path) -> None:
    whole, params = made(MODERNBERT, tmp_path)
    net, cut = made(MODERNBERT, tmp_path, num_layers_unfrozen=1, remat="full")
    trainable, frozen = partition(cut, net)
    assert set(frozen) == {"embed", "trunk"}
    assert jax.tree.leaves(trainable["layers"])[0].shape[0] == 1

    def total(net: Any, params: Any) -> jax.Array:
        hidden = net.hidden(params, jnp.asarray(IDS), lengths=jnp.asarray(LENGTHS))
        return jnp.sum(net.scores(params, hidden, jnp.asarray(LENGTHS)))

    score, grads = jax.jit(jax.value_and_grad(lambda p: total(net, p)))(cut)
    expected, full = jax.jit(jax.value_and_grad(lambda p: total(whole, p)))(params)
    np.testing.assert_allclose(score, expected, rtol=1e-6)
    assert all(not np.asarray(g).any() for g in jax.tree.leaves((grads["trunk"], grads["embed"])))
    for ours, theirs in zip(
        jax.tree.leaves(grads["layers"]), jax.tree.leaves(full["layers"]), strict=True
    ):
        scale = np.abs(np.asarray(theirs)).max()
        np.testing.assert_allclose(ours[0], theirs[-1], atol=1e-5 * scale)


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    net, params = made(DEBERTA, tmp_path)
    low = EncoderNet(net.spec.replace(dtype="bfloat16"))
    exact = scored(net, params, IDS, LENGTHS)
    rough = scored(low, params, IDS, LENGTHS)
    assert rough.dtype == np.float32
    assert not np.array_equal(rough, exact)
    np.testing.assert_allclose(rough, exact, atol=0.05 * np.abs(exact).max() + 0.02)


def test_a_new_classifier_grows_on_a_bare_trunk_with_tensorflow_names(tmp_path: Path) -> None:
    tensors = tensors_of(BERT)
    bare = {
        name.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
        if not name.startswith("classifier")
    }
    bare["cls.predictions.bias"] = np.zeros(40, np.float32)
    path = write_hf(tmp_path / "bare", BERT, bare)
    _, params, _ = load_pretrained(path, head="classifier", num_labels=1)
    whole = write_hf(tmp_path / "whole", BERT, tensors)
    _, wanted, _ = load_pretrained(whole, head="classifier")
    np.testing.assert_array_equal(
        params["layers"]["attn_norm"]["scale"], wanted["layers"]["attn_norm"]["scale"]
    )
    np.testing.assert_array_equal(
        params["pooler"]["dense"]["kernel"], wanted["pooler"]["dense"]["kernel"]
    )
    assert params["score"]["kernel"].shape == (16, 1)
    assert np.asarray(params["score"]["kernel"]).any()
    del bare["encoder.layer.0.output.dense.weight"]
    save_file(bare, path / "model.safetensors")
    with pytest.raises(MissingWeightError, match=r"missing: bert\.encoder\.layer\.0\.output"):
        load_pretrained(path, head="classifier")


@pytest.mark.parametrize("factory", [AutoModelForCausalLM, AutoModelForCausalLMWithValueHead])
def test_an_encoder_has_no_causal_and_no_value_head(factory: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEBERTA))
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"deberta-v2 is an encoder.*SequenceClassification"):
        factory.from_pretrained(tmp_path)


def test_an_encoder_neither_writes_nor_takes_a_value_head(tmp_path: Path) -> None:
    model = Model(*made(BERT, tmp_path))
    with pytest.raises(ModelError, match="it writes none"):
        model.generate(IDS)
    with pytest.raises(ModelError, match="value head"):
        model.respec(value_head=True)


def test_what_is_too_long_or_of_no_known_type_is_refused(tmp_path: Path) -> None:
    model = Model(*made(BERT, tmp_path))
    long = np.zeros((1, 33), np.int32)
    with pytest.raises(ModelError, match="33 tokens; this bert has positions for 32"):
        model(long)
    for kind in (2, -1):
        with pytest.raises(ModelError, match=f"from {kind} to {kind}; this bert knows types 0 to"):
            model(IDS, token_type_ids=np.full_like(IDS, kind))
    for place in (32, -1):
        with pytest.raises(ModelError, match=f"from {place} to {place}; this bert learned pos"):
            model(IDS, position_ids=np.full_like(IDS, place))
    for name in ("token_type_ids", "position_ids"):
        with pytest.raises(ModelError, match=f"{name} .* differ in shape"):
            model(IDS, **{name: np.zeros((5, 2), np.int32)})


def test_padding_may_have_any_position(tmp_path: Path) -> None:
    model = Model(*made(BERT, tmp_path))
    mask = np.ones_like(IDS)
    mask[:, -2:] = 0
    positions = np.where(mask, np.arange(IDS.shape[1]), -1)
    np.testing.assert_array_equal(
        model(IDS, mask, position_ids=positions).logits, model(IDS, mask).logits
    )
