"""A base in int8 and nf4: what is rounded and how far, and that nothing trains it."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.auto import AutoModelForCausalLM, AutoModelForSequenceClassification, Model
from jrlhf.errors import ConfigError, ModelError
from jrlhf.models.build import Net, combine, partition
from jrlhf.models.load import flatten, load_pretrained, nest
from jrlhf.models.quantize import dense, holds_quantized, is_quantized, quantizer
from jrlhf.models.spec import DecoderSpec
from jrlhf.peft import LoraConfig, PeftModel, get_peft_model
from jrlhf.sharding.mesh import make_mesh

pytest.importorskip("qwix", reason="needs the extra `qlora`")
SPEC = DecoderSpec(
    vocab_size=23,
    hidden_size=128,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
NET = Net(SPEC)
IDS = np.random.default_rng(0).integers(0, SPEC.vocab_size, (2, 5)).astype(np.int32)


@pytest.fixture(scope="module")
def base() -> Model:
    return Model(NET, jax.jit(NET.init)(jax.random.key(0)))


@pytest.fixture(scope="module", params=["int8", "nf4"])
def low(request: pytest.FixtureRequest, base: Model) -> tuple[str, PeftModel]:
    """The base quantised, and an adapter on it."""
    keep = quantizer(SPEC, request.param)
    params = nest({path: keep(path, leaf) for path, leaf in flatten(base.params).items()})
    chosen = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return request.param, get_peft_model(Model(NET, params), chosen)


def test_each_weight_is_rounded_within_its_block(base: Model, low: tuple[str, PeftModel]) -> None:
    kind, model = low
    for name, kernel in (("gate", ("mlp", "gate")), ("o", ("attn", "o"))):
        exact, held = (
            np.asarray(m.params["layers"][kernel[0]][kernel[1]]["kernel"][...])
            for m in (base, model)
        )
        if kind == "int8":  # a scale per layer and output; half a step of the largest weight
            inputs = tuple(range(1, exact.ndim - 1))
            bound = np.abs(exact).max(axis=inputs, keepdims=True) / 127 / 2
        else:  # a scale per block of inputs; half the widest gap of the sixteen levels
            block = 64 if name == "gate" else 6
            axis = exact.ndim - 2
            cut = np.moveaxis(exact, axis, -1)
            cut = cut.reshape(*cut.shape[:-1], -1, block)
            largest = np.broadcast_to(np.abs(cut).max(axis=-1, keepdims=True), cut.shape)
            largest = largest.reshape(*np.moveaxis(exact, axis, -1).shape)
            bound = np.moveaxis(largest, -1, axis) * (1 - 0.6961928) / 2
        assert np.all(np.abs(exact - held) <= bound * 1.001)
        assert np.abs(exact - held).max() > 0


def test_it_computes_what_its_dequantised_weights_compute(low: tuple[str, PeftModel]) -> None:
    _, model = low
    plain = Model(model.net, dense(model.params))
    expected = np.asarray(plain(IDS).logits)
    found = np.asarray(model(IDS).logits)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    merged = model.merge_and_unload()
    assert not holds_quantized(merged.params)
    assert np.abs(merged(IDS).logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_codes_take_an_eighth_to_a_quarter_of_the_memory(
    base: Model, low: tuple[str, PeftModel]
) -> None:
    kind, model = low
    gate = [m.params["layers"]["mlp"]["gate"]["kernel"] for m in (base, model)]
    bits = [8 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(t)) for t in gate]
    assert bits[1] < {"int8": 0.27, "nf4": 0.27}[kind] * bits[0]


def test_only_the_adapter_gets_a_gradient(low: tuple[str, PeftModel]) -> None:
    _, model = low
    trainable, frozen = partition(model.params, model.net)

    def loss(trainable: dict, frozen: dict) -> jax.Array:
        return jnp.sum(model.net.hidden(combine(trainable, frozen), IDS) ** 3)

    gradient = jax.jit(jax.grad(loss))(trainable, frozen)
    assert jax.tree.structure(gradient) == jax.tree.structure(trainable)
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(gradient))


def test_a_quantised_base_is_loaded_and_never_saved(tmp_path: Path, base: Model) -> None:
    base.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, load_in_8bit=True)
    assert holds_quantized(model.params)
    with pytest.raises(ModelError, match="save the adapter"):
        model.save_pretrained(tmp_path / "again")
    with pytest.raises(ConfigError, match="give one of them"):
        AutoModelForCausalLM.from_pretrained(tmp_path, load_in_8bit=True, load_in_4bit=True)
    with pytest.raises(ConfigError, match="int8 or nf4, not 'int3'"):
        quantizer(SPEC, "int3")
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 128


@pytest.mark.parametrize("kind", ["load_in_8bit", "load_in_4bit"])
def test_a_mesh_cuts_the_codes_and_changes_no_number(
    kind: str, tmp_path: Path, base: Model
) -> None:
    base.save_pretrained(tmp_path)
    found = []
    for mesh in (None, make_mesh("fsdp=4,tensor=2")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, mesh=mesh, **{kind: True})
        if mesh is not None:
            codes = model.params["layers"]["mlp"]["gate"]["kernel"].codes.qvalue
            assert codes.addressable_shards[0].data.size == codes.size // 8
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        trainable, frozen = partition(adapted.params, adapted.net)
        # B is zero at the start: moved, so that A has a gradient too.
        trainable = jax.tree.map(lambda x: x + 0.01 * jnp.cos(jnp.arange(x.size).reshape(x.shape)),
                                 jax.device_get(trainable))  # fmt: skip
        net = adapted.net

        def loss(trainable: dict, frozen: dict, net: Net = net) -> jax.Array:
            return jnp.sum(net.hidden(combine(trainable, frozen), IDS) ** 3)

        gradient = jax.jit(jax.grad(loss))(trainable, frozen)
        found.append(jax.device_get((model(IDS).logits, gradient)))
    for one, other in zip(*(jax.tree.leaves(f) for f in found), strict=True):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


@pytest.mark.parametrize("kind", ["load_in_8bit", "load_in_4bit"])
def test_experts_and_plain_mlps_between_them_are_quantised_too(kind: str, tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe", "vocab_size": 23, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 20,
        "mlp_only_layers": [1], "initializer_range": 0.3,
    }  # fmt: skip
    exact = AutoModelForCausalLM.from_config(config)
    exact.save_pretrained(tmp_path)
    low = AutoModelForCausalLM.from_pretrained(tmp_path, **{kind: True})
    layers = low.params["layers"]
    for group in ("attn", "mlp", "dense"):
        kernels = {name: part["kernel"] for name, part in layers[group].items() if "kernel" in part}
        held = {name for name, kernel in kernels.items() if is_quantized(kernel)}
        assert held == kernels.keys() - {"router"}
    assert low.num_parameters() == exact.num_parameters()
    plain = np.asarray(Model(low.net, dense(low.params))(IDS).logits)
    np.testing.assert_allclose(low(IDS).logits, plain, atol=2e-6 * np.abs(plain).max())
    # And sampling, whose layers are single ones.
    tokens = low.generate(IDS, max_new_tokens=4, eos_token_id=-1)
    again = Model(low.net, dense(low.params)).generate(IDS, max_new_tokens=4, eos_token_id=-1)
    np.testing.assert_array_equal(tokens, again)
    # An expert's weight is within a step of what it was.
    gate, rounded = (np.asarray(m.params["layers"]["mlp"]["gate"]["kernel"][...])[0]
                     for m in (exact, low))  # fmt: skip
    step = np.abs(gate).max(axis=1, keepdims=True) * (1 / 254 if "8" in kind else 0.152)
    assert np.all(np.abs(gate - rounded) <= step * 1.001)
    # A mesh that cuts the experts.
    many = AutoModelForCausalLM.from_pretrained(tmp_path, mesh="data=2,expert=4", **{kind: True})
    codes = many.params["layers"]["mlp"]["gate"]["kernel"].codes.qvalue
    assert codes.addressable_shards[0].data.shape[1] == 1
    np.testing.assert_allclose(many(IDS).logits, plain, atol=1e-5 * np.abs(plain).max())


def test_a_quantised_encoder_is_refused_before_it_is_read(tmp_path: Path) -> None:
    config = {
        "model_type": "bert", "vocab_size": 23, "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 16,
    }  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="bert model is an encoder: load_in_8bit"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, load_in_4bit=True)


def test_a_leaf_is_quantised_before_the_next_one_is_read(tmp_path: Path, base: Model) -> None:
    base.save_pretrained(tmp_path)
    given: list[weakref.ref] = []

    def keeper(net: Net) -> Any:
        keep = quantizer(net.spec, "nf4")

        def watched(path: tuple[str, ...], leaf: jax.Array) -> Any:
            assert all(ref() is None for ref in given), "a float32 kernel is still held"
            kept = keep(path, leaf)
            given.extend([weakref.ref(leaf)] * is_quantized(kept))
            return kept

        return watched

    load_pretrained(tmp_path, keeper=keeper)
    assert len(given) == 7
