"""Adapters: what must hold whatever the weights are, first values, files good and bad."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.auto import AutoModelForCausalLM, Model
from jrlhf.errors import (
    ConfigError,
    MissingFileError,
    MissingWeightError,
    ModelError,
    UnsupportedFieldError,
)
from jrlhf.models.build import Net, combine, partition
from jrlhf.models.hf.reader import SafetensorsCheckpoint
from jrlhf.models.lora.config import LoraConfig
from jrlhf.models.lora.layer import _drop
from jrlhf.models.lora.tree import get
from jrlhf.models.spec import DecoderSpec
from jrlhf.peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model

SPEC = DecoderSpec(
    vocab_size=23,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    attention_bias=True,
    initializer_range=0.3,
)
NET = Net(SPEC)
IDS = np.random.default_rng(0).integers(0, SPEC.vocab_size, (4, 6)).astype(np.int32)
# Every way at once: ranks and scales that differ by layer, layers left out, copies of modules.
MIXED = LoraConfig(
    r=4,
    lora_alpha=10,
    target_modules=["q_proj", "o_proj", "down_proj"],
    layers_to_transform=[0, 2],
    rank_pattern={"layers.2.self_attn.q_proj": 2},
    alpha_pattern={"down_proj": 3},
    modules_to_save=["lm_head", "input_layernorm"],
    init_lora_weights=False,
)


@pytest.fixture(scope="module")
def base() -> Model:
    return Model(NET, jax.jit(NET.init)(jax.random.key(0)))


def moved(model: PeftModel, name: str = "default", seed: int = 7) -> PeftModel:
    """The model with noise on every leaf of an adapter, magnitudes and copies too."""
    rng = np.random.default_rng(seed)
    held = model.params["adapters"]
    leaf = lambda x: x * (1 + 0.2 * rng.standard_normal(x.shape).astype(np.float32))  # noqa: E731
    own = jax.tree.map(leaf, held[name])
    model.params = {**model.params, "adapters": {**held, name: own}}
    return model


@pytest.fixture(scope="module")
def adapted(base: Model) -> PeftModel:
    return moved(get_peft_model(base, MIXED))


@pytest.fixture(scope="module")
def dora(base: Model) -> PeftModel:
    return moved(get_peft_model(base, MIXED.replace(use_dora=True, use_rslora=True)))


def logits(model: Model) -> np.ndarray:
    return np.asarray(model(IDS).logits)


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    theirs = np.asarray(theirs)
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


def test_a_new_adapter_gives_the_bases_logits_exactly(base: Model) -> None:
    new = get_peft_model(base, LoraConfig(target_modules="all-linear", lora_dropout=0.5))
    np.testing.assert_array_equal(logits(new), logits(base))


@pytest.mark.parametrize("kind", ["adapted", "dora"])
def test_merging_gives_the_adapters_logits_and_leaves_the_base_alone(
    base: Model, kind: str, request: pytest.FixtureRequest
) -> None:
    model: PeftModel = request.getfixturevalue(kind)
    before = jax.tree.map(np.array, base.params)
    merged = model.merge_and_unload()
    assert type(merged) is Model
    assert np.abs(logits(model) - logits(base)).max() > 0.1
    close(logits(merged), logits(model))
    jax.tree.map(np.testing.assert_array_equal, before, base.params)
    # What is not adapted is the same array, not a copy.
    assert merged.params["embed"]["table"] is base.params["embed"]["table"]
    assert merged.params["layers"]["mlp"]["up"] is base.params["layers"]["mlp"]["up"]


@pytest.mark.parametrize("kind", ["adapted", "dora"])
def test_decoding_with_an_adapter_equals_the_full_forward(
    kind: str, request: pytest.FixtureRequest
) -> None:
    model: PeftModel = request.getfixturevalue(kind)
    net, cut = model.net, np.array([4, 3, 4, 2], np.int32)

    @jax.jit
    def run(params: Any) -> tuple[jax.Array, jax.Array]:
        full = net.hidden(params, IDS)
        light = net.unstack(params)
        _, cache = net.prefill(params, IDS[:, :4], cut, cache_size=6)
        valid = (jnp.arange(6) < cut[:, None]) | (jnp.arange(6) == 4)
        token = jnp.take_along_axis(jnp.asarray(IDS), cut[:, None], axis=1)[:, 0]
        state, _ = net.decode(light, token, cut, cache, slot=4, valid=valid)
        return full, state

    full, state = run(model.params)
    close(state, np.take_along_axis(np.asarray(full), cut[:, None, None], axis=1)[:, 0])


def test_adapters_are_switched_added_up_disabled_and_deleted(base: Model) -> None:
    model = get_peft_model(base, LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False),
                      seed=1)  # fmt: skip
    assert model.active_adapters == ["default"]
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model)
    model.set_adapter(["default", "other"])
    # Both together are the base plus both changes of the weights.
    kernels = [get(m.params, ("layers", "attn", "v", "kernel")) for m in (
        base, *(_only(model, name).merge_and_unload() for name in alone), model.merge_and_unload()
    )]  # fmt: skip
    close(kernels[3] - kernels[0], kernels[1] - kernels[0] + kernels[2] - kernels[0])
    close(logits(model.merge_and_unload()), logits(model))
    with model.disable_adapter():
        np.testing.assert_array_equal(logits(model), logits(base))
        assert model.active_adapters == []
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    np.testing.assert_array_equal(logits(model), alone["other"])
    assert np.abs(alone["other"] - alone["default"]).max() > 0.1
    with pytest.raises(ConfigError, match=r"no adapter 'othr'.*Did you mean \"other\""):
        model.set_adapter("othr")


def _only(model: PeftModel, name: str) -> PeftModel:
    one = PeftModel.__new__(PeftModel)
    one.__dict__ = {**model.__dict__}
    one.set_adapter(name)
    return one


def test_only_the_adapter_is_trainable_and_the_halves_make_a_whole(adapted: PeftModel) -> None:
    trainable, frozen = partition(adapted.params, adapted.net)
    assert set(trainable) == {"adapters"}
    assert set(frozen["adapters"]) == set()
    assert jax.tree.structure(combine(trainable, frozen)) == jax.tree.structure(adapted.params)
    assert jax.tree.structure(adapted.net.abstract()) == jax.tree.structure(adapted.params)
    names = jax.tree.leaves(adapted.net.axes(), is_leaf=lambda x: isinstance(x, tuple))
    assert [len(n) for n in names] == [x.ndim for x in jax.tree.leaves(adapted.params)]


def test_the_base_costs_no_gradient(adapted: PeftModel) -> None:
    """Backwards, a full model does two matmuls per weight; with a frozen base one."""

    def flops(net: Net, params: Any) -> float:
        def loss(trainable: Any, frozen: Any) -> jax.Array:
            return jnp.sum(net.hidden(combine(trainable, frozen), np.tile(IDS, (8, 4))) ** 2)

        return jax.jit(jax.grad(loss)).lower(*partition(params, net)).cost_analysis()["flops"]

    small = NET.adapter(LoraConfig(r=1, target_modules=["q_proj"]))
    net = Net(SPEC.replace(hidden_size=96), (small,))
    assert flops(net, net.abstract()) < 0.8 * flops(net.base, net.base.abstract())


def test_padding_of_ranks_is_zero_and_gets_no_gradient(adapted: PeftModel) -> None:
    net = adapted.net

    def loss(trainable: Any, frozen: Any) -> jax.Array:
        return jnp.sum(net.hidden(combine(trainable, frozen), IDS) ** 2)

    gradient = jax.jit(jax.grad(loss))(*partition(adapted.params, net))
    for tree in (adapted.params, gradient):
        query = tree["adapters"]["default"]["layers"]["attn"]["q"]
        assert not np.any(query["a"][2][..., 2:])
        assert not np.any(query["b"][2][2:])
        assert not np.any(query["a"][1])
        assert not np.any(query["b"][1])
        assert np.all(query["a"][0])
        assert np.all(query["b"][0])


# ------------------------------------------------------------------ dropout


def test_dropout_is_a_function_of_the_row_and_the_module_and_keeps_the_mean(base: Model) -> None:
    chosen = LoraConfig(target_modules=["down_proj"], lora_dropout=0.5, init_lora_weights=False,
                        layers_to_transform=[2])  # fmt: skip
    model = get_peft_model(base, chosen)
    run = jax.jit(lambda p, ids, keys: model.net.hidden(p, ids, dropout=keys))
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), 4)))
    plain = jax.jit(model.net.hidden)(model.params, IDS)
    one = run(model.params, IDS, keys)
    assert np.abs(one - plain).max() > 0.01
    # Rows go with their keys, wherever they stand and whatever follows them.
    order = np.array([2, 0, 1, 3])
    close(run(model.params, IDS[order], keys[order]), np.asarray(one)[order], 1e-6)
    tails = [np.pad(IDS, ((0, 0), (0, 2)), constant_values=token) for token in (0, 5)]
    first, second = (run(model.params, ids, keys)[:, :6] for ids in tails)
    np.testing.assert_array_equal(first, second)
    # Two equal rows with two keys drop differently.
    twins = run(model.params, IDS[[0, 0, 0, 0]], keys)
    assert np.abs(twins[0] - twins[1]).max() > 0.01


def test_what_is_dropped_of_a_row_is_the_same_at_any_length_and_place() -> None:
    """To the bit, which programs of two lengths are not."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 12)), jnp.float32)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 4))
    dropped = _drop(x, keys, jnp.uint32(9), 0.5)
    assert 0.3 < np.mean(dropped == 0) < 0.7
    np.testing.assert_array_equal(_drop(x[:, :6], keys, jnp.uint32(9), 0.5), dropped[:, :6])
    order = np.array([2, 0, 1, 3])
    np.testing.assert_array_equal(_drop(x[order], keys[order], jnp.uint32(9), 0.5), dropped[order])


def test_the_dropped_path_keeps_its_mean() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 3, 4)), jnp.float32)
    keys = jax.random.key_data(jax.random.split(jax.random.key(1), 4000))[:, None]
    dropped = np.asarray(jax.vmap(lambda k: _drop(x, k, jnp.uint32(9), 0.25))(keys))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], np.broadcast_to(x / 0.75, dropped.shape)[kept], 1e-6)
    # Standard error of a mean of 4000 draws of 0 or 4/3: 0.0091.
    assert np.abs(kept.mean(axis=0) - 0.75).max() < 5 * 0.0069
    other = np.asarray(jax.vmap(lambda k: _drop(x, k, jnp.uint32(8), 0.25))(keys[:9]))
    assert not np.array_equal(other != 0, kept[:9])


def test_first_values_are_pefts() -> None:
    wide = Net(SPEC.replace(hidden_size=400, num_hidden_layers=1))
    for init, spread in ((True, 1 / np.sqrt(3 * 400)), ("gaussian", 1 / 8), (False, None)):
        adapter = wide.adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=init))
        net = dataclasses.replace(wide, adapters=(adapter,))
        held = jax.jit(net.init)(jax.random.key(0))["adapters"]["default"]["layers"]["attn"]["q"]
        if spread is None:
            assert np.abs(held["b"]).max() <= 8**-0.5
            assert np.std(held["b"]) == pytest.approx(8**-0.5 / 3**0.5, rel=0.2)
        else:
            assert not np.any(held["b"])
            assert np.std(held["a"]) == pytest.approx(spread, rel=0.05)
        if init is True:
            assert np.abs(held["a"]).max() <= 400**-0.5


# ------------------------------------------------------------------ files


def test_an_adapter_comes_back_bitwise_and_twice_under_two_names(
    base: Model, dora: PeftModel, tmp_path: Path
) -> None:
    dora.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path)
    again.load_adapter(tmp_path, "twin")
    for name in ("default", "twin"):
        jax.tree.map(
            np.testing.assert_array_equal,
            again.params["adapters"][name], dora.params["adapters"]["default"],
        )  # fmt: skip
    again.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "twin" / "adapter_model.safetensors").is_file()
    assert again.net == dora.net
    with pytest.raises(ConfigError, match="already"):
        again.load_adapter(tmp_path, "twin")


def test_files_that_do_not_fit_are_named(base: Model, adapted: PeftModel, tmp_path: Path) -> None:
    adapted.save_pretrained(tmp_path)
    narrow = Net(SPEC.replace(hidden_size=8, num_hidden_layers=2))
    other = Model(narrow, narrow.abstract())
    with pytest.raises(MissingWeightError, match="does not fit this base") as caught:
        PeftModel.from_pretrained(other, tmp_path)
    text = str(caught.value)
    assert "shape of base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is" in text
    assert "unexpected: base_model.model.model.layers.2.mlp.down_proj.lora_A.weight" in text

    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for changes, error, match in (
        ({"peft_type": "LOHA"}, UnsupportedFieldError, "peft_type='LOHA'"),
        ({"use_qalora": True}, UnsupportedFieldError, "use_qalora is not supported"),
        ({"surprise": 3}, ConfigError, "no field 'surprise'"),
        ({"target_modules": [*config["target_modules"], "v_proj"]}, MissingWeightError,
         r"missing: base_model\S*v_proj.lora_A"),
    ):  # fmt: skip
        file.write_text(json.dumps({**config, **changes}))
        with pytest.raises(error, match=match):
            PeftModel.from_pretrained(base, tmp_path)
    file.write_text(json.dumps(config))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        PeftModel.from_pretrained(base, tmp_path)
    weights.unlink()
    with pytest.raises(MissingFileError, match=r"has no adapter_model\.safetensors"):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(MissingFileError, match="not an adapter directory"):
        PeftModel.from_pretrained(base, tmp_path.parent)


def test_an_adapter_is_checked_before_a_weight_of_its_base_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Model(NET, jax.jit(NET.init)(jax.random.key(0)))
    whole.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(loaded, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "fits")
    adapted.save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "adapter_model.safetensors").unlink()
    asked: list[str] = []
    read = SafetensorsCheckpoint.read
    monkeypatch.setattr(
        SafetensorsCheckpoint, "read", lambda *given: (asked.append(given[1]), read(*given))[1]
    )
    with pytest.raises(MissingFileError, match="has no adapter_model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    for factory in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        with pytest.raises(ConfigError, match="num_layers_unfrozen means nothing"):
            factory.from_pretrained(tmp_path / "fits", num_layers_unfrozen=1)
    assert not asked
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "fits", adapter_name="own")
    assert asked


def test_a_model_cannot_have_adapters_over_adapters_or_over_a_trunk(adapted: PeftModel) -> None:
    with pytest.raises(ModelError, match="adapters already"):
        get_peft_model(adapted, LoraConfig())
    trunk = Net(SPEC.replace(trunk_layers=1))
    with pytest.raises(ConfigError, match="num_layers_unfrozen means nothing"):
        get_peft_model(Model(trunk, trunk.abstract()), LoraConfig())
