"""Families without an oracle: configs there and back, weight tables, and what is refused."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from jrlhf.errors import UnsupportedModelError
from jrlhf.models.build import Net, combine, partition
from jrlhf.models.context import layer_flags
from jrlhf.models.families import DECODERS, config_from_spec, family_of, spec_from_config
from jrlhf.models.load import load_pretrained
from jrlhf.models.save import save_pretrained

# No two sizes alike where a family allows it, so that a swapped axis cannot fit.
SMALL = {
    "vocab_size": 19, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 4,
    "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 40,
    "head_dim": 4, "ffn_dim": 20, "moe_intermediate_size": 10, "num_local_experts": 5,
    "num_experts_per_tok": 2, "n_embd": 12, "n_inner": 20, "n_layer": 4, "n_head": 3,
    "n_positions": 40, "rotary_dim": 2, "sliding_window": 7,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0],
    "attention_factor": 1.5,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 0.5}
FLAGS = {
    "cohere": {"use_qk_norm": True},
    "gemma2": {"query_pre_attn_scalar": 168},
    "gemma3_text": {
        "sliding_window_pattern": 2,
        "rope_parameters": {"full_attention": {**YARN, "rope_theta": 3e5}},
    },
    "gpt2": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 500, "use_parallel_residual": False},
    "granite": {"logits_scaling": 49.0, "embedding_multiplier": 12.0},
    "llama": {"rope_parameters": {**YARN, "truncate": False}},
    "opt": {
        "enable_bias": False,
        "word_embed_proj_dim": 8,
        "do_layer_norm_before": False,
        "layer_norm_elementwise_affine": False,
    },
    "phi3": {"rope_scaling": LONG, "original_max_position_embeddings": 16},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_moe": {"use_sliding_window": True, "norm_topk_prob": True, "mlp_only_layers": [1, 2]},
    "smollm3": {"use_sliding_window": True, "rope_parameters": {**LONG, "factor": 2.0}},
}


def config(family, **changes):
    return {"model_type": family, **SMALL, **changes}


@pytest.fixture(params=sorted(DECODERS))
def family(request):
    return request.param


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("head", ["causal", "classifier", "tokens"])
def test_a_config_written_from_a_spec_gives_the_spec_back(family, flagged, head):
    given = config(family, **(FLAGS.get(family, {}) if flagged else {}))
    spec = spec_from_config(given, head=head, num_labels=2)
    written = config_from_spec(spec)
    assert spec_from_config(written, head=head, num_labels=2) == spec
    for key in given.keys() & written.keys() - {"rope_parameters", "sliding_window"}:
        assert written[key] == given[key], key


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("head", ["classifier", "tokens"])
def test_every_decoder_is_a_classifier_of_any_number_of_labels(family, head, labels):
    spec = spec_from_config(config(family), head=head, num_labels=labels)
    net, ids = Net(spec), jax.ShapeDtypeStruct((2, 9), np.int32)
    lengths = jax.ShapeDtypeStruct((2,), np.int32)

    def scores(params, ids, lengths):
        hidden = net.hidden(params, ids, lengths=lengths)
        if head == "tokens":
            return net.token_scores(params, hidden)
        return net.scores(params, hidden, lengths)

    out = jax.eval_shape(scores, net.abstract(), ids, lengths)
    assert out.shape == ((2, labels) if head == "classifier" else (2, 9, labels))
    rows = {row.path: row for row in family_of(spec).weights(spec)}
    assert rows["score", "kernel"].hf_shape == (labels, spec.hidden_size)
    assert (("score", "bias") in rows) == (head == "tokens")
    written = config_from_spec(spec)
    assert len(written["id2label"]) == labels
    kind = "Sequence" if head == "classifier" else "Token"
    assert written["architectures"][0].endswith(f"For{kind}Classification")


def test_the_weight_table_covers_each_parameter_once(family):
    spec = spec_from_config(config(family), value_head=True, trunk_layers=1)
    net = Net(spec)
    filled = jax.tree.map(lambda leaf: np.zeros(leaf.shape, int), net.abstract())
    tensors = {}
    for row in family_of(spec).weights(spec):
        ours = np.arange(math.prod(row.shape)).reshape(row.shape)
        theirs = row.to_hf(ours)
        if row.part is not None:
            whole = tensors.setdefault(row.name, np.full(row.hf_shape, -1))
            row.part.put(whole, theirs)
            theirs = whole
        assert theirs.shape == row.hf_shape
        np.testing.assert_array_equal(row.from_hf(theirs), ours)
        for _, path, at in row.places(spec):
            node = filled
            for key in path:
                node = node[key]
            place = node if at is None else node[at]
            assert place.shape == row.shape
            place += 1
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(filled))
    assert all((whole >= 0).all() for whole in tensors.values())  # no stripe is left out


def test_axes_name_every_axis_of_every_parameter(family):
    net = Net(spec_from_config(config(family)))
    names = jax.tree.leaves(net.axes(), is_leaf=lambda x: isinstance(x, tuple))
    sizes = {
        "layers": {4}, "vocab": {19}, "embed": {12}, "heads": {3}, "kv_heads": {1, 3},
        "mlp": {20, 10}, "expert": {5},
    }  # fmt: skip
    for leaf, axes in zip(jax.tree.leaves(net.abstract()), names, strict=True):
        assert len(axes) == leaf.ndim
        assert all(size in sizes[axis] for size, axis in zip(leaf.shape, axes) if axis)
    if net.spec.moe:
        assert net.axes()["layers"]["mlp"]["up"]["kernel"] == ("layers", "expert", "embed", "mlp")


def test_what_widens_embeddings_is_frozen_with_them():
    spec = spec_from_config(config("opt", **FLAGS["opt"]), trunk_layers=2)
    net = Net(spec)
    params = jax.jit(net.init)(jax.random.key(0))
    trainable, frozen = partition(params, net)
    assert "project_in" in frozen
    assert "project_out" in trainable
    ids = np.arange(18).reshape(2, 9)
    below = net.trunk(params, ids)
    assert below.shape[-1] == spec.hidden_size != spec.head_size
    zeros = jax.tree.map(np.zeros_like, frozen)
    resumed = net.hidden(combine(trainable, zeros), ids, trunk=below)
    np.testing.assert_array_equal(resumed, net.hidden(params, ids))


@pytest.mark.parametrize(
    ("family", "changes", "same"),
    [
        ("gpt2", {"num_attention_heads": 6}, {"num_attention_heads": 6, "n_head": 6}),
        ("gptj", {"num_hidden_layers": 2}, {"num_hidden_layers": 2, "n_layer": 2}),
        ("gptj", {"num_attention_heads": None}, {"num_attention_heads": 3}),
        ("distilbert", {"dim": 24, "n_heads": 2, "hidden_size": 12}, {"dim": 12, "n_heads": 3}),
        ("mixtral", {"num_experts": 4}, {"num_local_experts": 4}),
        ("modernbert", {"sliding_window": 6}, {"sliding_window": None, "local_attention": 12}),
        ("smollm3", {"num_key_value_heads": None}, {"num_key_value_heads": 3}),
        ("llama", {"id2label": {"0": "a"}, "num_labels": 4}, {"num_labels": 4}),
        ("bert", {"id2label": {"0": "a", "1": "b", "2": "c"}}, {"num_labels": 3}),
        ("gemma", {"hidden_act": None, "hidden_activation": "silu"}, {"hidden_act": "silu"}),
    ],
)
def test_a_config_that_says_the_same_in_other_words_is_the_same_model(family, changes, same):
    assert spec_from_config(config(family, **changes)) == spec_from_config(config(family, **same))


REFUSED = [
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "spiral"}}, "has rope_type: give a dict"),
    ("gemma3_text", {"rope_parameters": {"full": {"rope_type": "linear"}}}, "has full: give"),
    ("gemma", {"hidden_act": "gelu", "hidden_activation": "silu"}, "'silu' disagree"),
    ("gpt_neox", {"head_dim": 6}, "head_dim=6"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt2", {"activation_function": "mish"}, "activation_function='mish'"),
    ("gptj", {"rotary_dim": None}, "rotary_dim=None"),
    ("gptj", {"rotary_dim": 64}, "rotary_dim=64"),
    ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ("gpt_oss", {"num_experts_per_tok": 6}, "num_experts_per_tok=6"),
    ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types"),
    ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5"),
    ("qwen2", {"use_sliding_window": True, "layer_types": ["chunked_attention"]}, "chunked"),
    (
        "qwen2",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "only for gemma3_text and modernbert",
    ),
    ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "'qwen3'"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
    ("qwen3_moe", {"decoder_sparse_step": 2.5}, "decoder_sparse_step=2.5 must be a whole number"),
    ("qwen3_moe", {"mlp_only_layers": 0}, "mlp_only_layers=0 must be numbers of layers"),
    ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers"),
    ("qwen3_moe", {"num_experts": 0, "num_local_experts": None}, "num_experts=0"),
    ("qwen3_moe", {"decoder_sparse_step": 2, "intermediate_size": 0}, "intermediate_size=0"),
]


@pytest.mark.parametrize(("family", "changes", "named"), REFUSED)
def test_a_flag_that_is_not_implemented_is_an_error_that_names_it(family, changes, named):
    with pytest.raises(UnsupportedModelError, match=named):
        spec_from_config(config(family, **changes))


def test_a_spec_that_no_config_of_its_family_says_is_not_written():
    spec = spec_from_config(config("qwen2")).replace(windows=(3, 0, 5, 0))
    with pytest.raises(UnsupportedModelError, match="windows"):
        config_from_spec(spec)
    with pytest.raises(UnsupportedModelError, match="attention_softcap"):
        config_from_spec(spec.replace(windows=(), attention_softcap=3.0))


def test_old_configs_mean_the_same():
    old = {"rope_theta": 2e6, "rope_local_base_freq": 2e4, "rope_scaling": {"type": "linear"}}
    old["rope_scaling"]["factor"] = 8.0
    spec = spec_from_config(config("gemma3_text", **old))
    assert (spec.rope.rope_theta, spec.rope.factor) == (2e6, 8.0)
    assert (spec.local_rope.rope_theta, spec.local_rope.rope_type) == (2e4, "default")
    assert spec.windows == (7, 7, 7, 7)  # the sixth layer would be the first full one
    spec = spec_from_config(config("phi3", rope_scaling={**LONG, "type": "su", "rope_type": None}))
    assert spec.rope.rope_type == "longrope"
    assert spec.rope.factor == 40 / 4096
    spec = spec_from_config(config("gpt_neox", rotary_pct=0.5, rotary_emb_base=77))
    assert (spec.rope.rope_theta, spec.rope.turned(4)) == (77.0, 2)


def test_layers_alike_have_no_flags():
    plain = layer_flags(spec_from_config(config("llama")))
    assert tuple(plain) == (None, None, None, None)
    mixed = layer_flags(spec_from_config(config("gemma2")))
    assert mixed.window.tolist() == [7, 2**31 - 1, 7, 2**31 - 1]


@pytest.mark.parametrize("family", ["gemma2", "smollm3", "gpt_oss", "gpt2"])
def test_a_deeper_model_is_no_larger_program(family):
    """Layers that differ are scanned like layers that do not."""

    def equations(layers):
        depth = {"num_hidden_layers": layers, "n_layer": layers}
        flags = {"scale_attn_by_inverse_layer_idx": True}
        net = Net(spec_from_config(config(family, **depth, **flags)))
        ids = jax.ShapeDtypeStruct((2, 9), np.int32)
        return str(jax.make_jaxpr(net.hidden)(net.abstract(), ids)).count("\n")

    assert equations(32) == equations(8)


@pytest.mark.parametrize("family", ["phi3", "gpt2", "gpt_neox", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("head", ["causal", "classifier"])
def test_fused_and_split_tensors_load_and_save_alike(tmp_path, family, head, hf_tensors):
    path, tensors = hf_tensors(config(family), head=head)
    net, params, source = load_pretrained(path, head=head)
    save_pretrained(tmp_path / "again", net, params, source=source, max_shard_size="4KB")
    from jrlhf.models.hf.reader import SafetensorsCheckpoint

    again = SafetensorsCheckpoint(tmp_path / "again")
    assert again.shapes.keys() == tensors.keys()
    for name, tensor in tensors.items():
        whole = tuple(slice(0, n) for n in tensor.shape)
        np.testing.assert_array_equal(again.read(name, whole), tensor, err_msg=name)
