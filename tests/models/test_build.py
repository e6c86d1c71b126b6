"""Specs, configs, the weight table, and the boundary between modules and params."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.auto import AutoModelForCausalLM
from jrlhf.errors import ModelError, UnsupportedModelError
from jrlhf.models import axes
from jrlhf.models.build import Net, combine, partition
from jrlhf.models.families import config_from_spec, family_of, spec_from_config
from jrlhf.models.spec import DecoderSpec, RopeSpec

SPEC = DecoderSpec(
    vocab_size=19,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=4,
    attention_bias=True,
    mlp_bias=True,
)
VARIANTS = {
    "causal": {},
    "tied": {"tie_word_embeddings": True},
    "value head": {"value_head": True},
    "classifier": {"head": "classifier", "num_labels": 3},
    "trunk": {"trunk_layers": 2},
    "all frozen": {"trunk_layers": 3, "value_head": True},
    "no biases": {"attention_bias": False, "mlp_bias": False},
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(**changes):
    return {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, **changes}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_axes_name_every_axis_of_every_parameter(changes):
    net = Net(SPEC.replace(**changes))
    params, names = net.abstract(), net.axes()
    assert jax.tree.structure(params) == jax.tree.structure(
        names, is_leaf=lambda x: isinstance(x, tuple)
    )
    known = {*axes.PARAMETER_AXES, None}
    sizes = {
        "layers": {net.spec.trunk_layers, net.spec.trainable_layers},
        "vocab": {19},
        "embed": {12},
        "heads": {3},
        "kv_heads": {1},
        "mlp": {20},
    }
    leaves = jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, tuple))
    for leaf, name in zip(jax.tree.leaves(params), leaves, strict=True):
        assert len(name) == leaf.ndim
        assert set(name) <= known
        assert all(size in sizes[axis] for size, axis in zip(leaf.shape, name) if axis)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_weight_table_covers_each_parameter_once(changes):
    net = Net(SPEC.replace(**changes))
    filled = jax.tree.map(lambda leaf: np.zeros(leaf.shape, int), net.abstract())
    names = []
    for weight in family_of(net.spec).weights(net.spec):
        for name, path, index in weight.places(net.spec):
            node = filled
            for key in path:
                node = node[key]
            place = node if index is None else node[index]
            assert place.shape == weight.shape, name
            place += 1
            names.append(name)
    assert len(set(names)) == len(names)
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(filled))


def test_a_weight_goes_to_the_checkpoint_and_back():
    for weight in family_of(SPEC).weights(SPEC):
        ours = np.arange(math.prod(weight.shape)).reshape(weight.shape)
        theirs = weight.to_hf(ours)
        assert theirs.shape == weight.hf_shape
        np.testing.assert_array_equal(weight.from_hf(theirs), ours)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, RopeSpec()),
        ({"rope_theta": 5e5}, RopeSpec(rope_theta=5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, RopeSpec(rope_theta=7)),
        # rope_theta of transformers 4 beside a 5-style dict that lacks it
        (
            {"rope_theta": 3e4, "rope_parameters": {"rope_type": "default"}},
            RopeSpec(rope_theta=3e4),
        ),
        ({"rope_scaling": None, "rope_theta": 1e5}, RopeSpec(rope_theta=1e5)),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e5},
            RopeSpec(rope_type="linear", factor=2.0, rope_theta=1e5),
        ),
        (
            {"rope_scaling": LLAMA3, "rope_theta": 5e5},
            RopeSpec(**{**LLAMA3, "rope_theta": 5e5}),
        ),
        (
            {
                "rope_parameters": {
                    **{k: v for k, v in LLAMA3.items() if not k.startswith("original")},
                    "rope_theta": 5e5,
                },
                "max_position_embeddings": 512,
            },
            RopeSpec(**{**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 512}),
        ),
    ],
)
def test_rotary_parameters_of_both_transformers_versions_are_read(keys, expected):
    assert spec_from_config(config(**keys)).rope == expected


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "lama"},
        {"model_type": None},
        {"rope_scaling": {"type": "ntk", "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic"}},
        {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear"}},
        {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {"partial_rotary_factor": 0.5},
        {"hidden_act": "relu6"},
        {"quantization_config": {"bits": 4}},
        {"num_key_value_heads": 3},
        {"head_dim": 5},
    ],
    ids=str,
)
def test_what_is_not_implemented_is_a_named_error(keys):
    with pytest.raises(UnsupportedModelError):
        spec_from_config(config(**keys))


def test_an_unknown_model_type_names_the_nearest():
    with pytest.raises(UnsupportedModelError, match='Did you mean "llama"'):
        spec_from_config(config(model_type="llamma"))


@pytest.mark.parametrize(
    "field",
    ["norm", "hidden_act", "head", "dtype", "remat"],
)
def test_a_spec_refuses_unknown_names(field):
    with pytest.raises(UnsupportedModelError, match=field):
        SPEC.replace(**{field: "no such"})


@pytest.mark.parametrize("layers", [-1, 4])
def test_a_trunk_has_at_most_all_layers(layers):
    with pytest.raises(UnsupportedModelError, match="trunk_layers"):
        SPEC.replace(trunk_layers=layers)


def test_defaults_of_an_old_short_config_are_llamas():
    spec = spec_from_config({"model_type": "llama"}, head="classifier", dtype="bfloat16")
    assert (spec.hidden_size, spec.head_dim, spec.num_key_value_heads) == (4096, 128, 32)
    assert (spec.norm_eps, spec.num_labels, spec.head) == (1e-6, 2, "classifier")
    assert spec.dtype == "bfloat16"


@pytest.mark.parametrize("changes", [{}, {"rope": RopeSpec(**LLAMA3)}, {"head": "classifier"}])
def test_a_config_written_from_a_spec_gives_the_spec_back(changes):
    spec = SPEC.replace(num_labels=2, **changes)
    assert spec_from_config(config_from_spec(spec), head=spec.head) == spec


def test_a_spec_that_is_no_llama_is_not_written_as_one():
    with pytest.raises(UnsupportedModelError, match="norm"):
        config_from_spec(SPEC.replace(norm="layer"))


def test_initial_weights_have_the_configured_spread_and_depend_on_the_key_alone():
    spec = SPEC.replace(hidden_size=64, intermediate_size=128, initializer_range=0.05)
    init = jax.jit(Net(spec).init)
    params, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name == "scale":
            assert (leaf == 1).all()
        elif name == "bias":
            assert (leaf == 0).all()
        else:
            # Five standard errors of a standard deviation from leaf.size draws.
            assert abs(leaf.std() / 0.05 - 1) < 5 / math.sqrt(2 * leaf.size)
    gate = params["layers"]["mlp"]["gate"]["kernel"]
    assert not np.allclose(gate[0], gate[1])
    assert not np.allclose(gate, other["layers"]["mlp"]["gate"]["kernel"])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_partition_and_combine_are_inverse(changes):
    net = Net(SPEC.replace(**changes))
    params = net.abstract()
    trainable, frozen = partition(params, net)
    assert combine(trainable, frozen) == params
    assert set(trainable).isdisjoint(frozen)
    assert ("embed" in frozen) == bool(net.spec.trunk_layers)


def test_a_missing_head_is_a_named_error():
    causal, classifier = Net(SPEC), Net(SPEC.replace(head="classifier"))
    hidden, lengths = jnp.zeros((1, 2, 12)), jnp.array([2])
    with pytest.raises(ModelError, match="value_head=True"):
        causal.values(causal.abstract(), hidden)
    with pytest.raises(ModelError, match="classifier"):
        causal.scores(causal.abstract(), hidden, lengths)
    with pytest.raises(ModelError, match="causal"):
        classifier.head(classifier.abstract())


def test_a_cache_smaller_than_the_prompt_is_refused():
    net = Net(SPEC)
    with pytest.raises(ModelError, match="cache_size=3"):
        net.prefill(net.abstract(), jnp.zeros((1, 4), int), jnp.array([4]), cache_size=3)


def test_scores_are_of_the_last_real_token_and_an_empty_row_is_harmless():
    net = Net(SPEC.replace(head="classifier", num_labels=2))
    params = net.init(jax.random.key(0))
    hidden = jax.random.normal(jax.random.key(1), (3, 5, 12))
    scores = net.scores(params, hidden, jnp.array([5, 2, 0]))
    expected = np.stack([hidden[0, 4], hidden[1, 1], hidden[2, 0]]) @ params["score"]["kernel"]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-7)


def test_constrain_is_the_identity_until_a_resolver_is_installed():
    seen = []

    def resolver(x, names):
        seen.append((x.shape, names))
        return x

    net = Net(SPEC)
    ids = jnp.zeros((2, 4), jnp.int32)
    with axes.resolve_with(resolver):
        jax.eval_shape(net.hidden, net.abstract(), ids)
    assert ((2, 4, 12), ("batch", "sequence", None)) in seen
    assert ((2, 4, 3, 4), ("batch", "sequence", "heads", None)) in seen
    assert ((2, 4, 1, 4), ("batch", "sequence", "kv_heads", None)) in seen
    assert ((2, 4, 20), ("batch", "sequence", "mlp")) in seen
    known = {*axes.ACTIVATION_AXES, None}
    assert all(set(names) <= known for _, names in seen)
    count = len(seen)
    jax.eval_shape(net.hidden, net.abstract(), ids[:, :3])
    assert len(seen) == count
    with pytest.raises(ValueError, match="axis names"):
        axes.constrain(ids, ("batch",))


def test_a_net_is_hashable_and_equal_by_its_spec():
    assert Net(SPEC) == Net(SPEC.replace())
    assert hash(Net(SPEC)) == hash(Net(SPEC.replace()))
    assert Net(SPEC) != Net(SPEC.replace(remat="full"))


def test_a_call_with_what_the_model_does_not_have_is_named() -> None:
    values = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 11,
              "n_positions": 4}  # fmt: skip
    model = AutoModelForCausalLM.from_config(values)
    with pytest.raises(ModelError, match="input_ids go from 1 to 11; this gpt2 has tokens 0 to 10"):
        model([[1, 11]])
    with pytest.raises(ModelError, match="differ in shape"):
        model([[1, 2]], [[1, 1, 1]])
    with pytest.raises(ModelError, match="A row has 5 tokens; this gpt2 has positions for 4"):
        model([[1, 2, 3, 4, 5]])
    for place in (4, -1):
        with pytest.raises(ModelError, match=r"position_ids go from .* learned positions 0 to 3"):
            model([[1, 2]], position_ids=[[0, place]])
    for value in (2, -1, 0.5):
        with pytest.raises(ModelError, match=f"attention_mask holds {value}; it is 1 for real"):
            model([[1, 2]], [[1, value]])
    with pytest.raises(ModelError, match="input_ids must be whole numbers, got float64"):
        model([[1.0, 2.5]])
    with pytest.raises(ModelError, match="input_ids go from 1 to 4294967297"):
        model([[1, 2**32 + 1]])
