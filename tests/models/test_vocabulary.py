"""Vocabularies made larger, smaller, or padded: what is no token changes nothing."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jrlhf import AutoModelForCausalLM, AutoModelForSequenceClassification
from jrlhf.errors import ConfigError, ModelError
from jrlhf.peft import LoraConfig, PeftModel, get_peft_model
from jrlhf.rollout.score import outputs
from tests.models.conftest import CONFIG, tensors_of, write_hf

V = CONFIG["vocab_size"]
GPTJ = {
    "model_type": "gptj", "vocab_size": V, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 24,
    "rotary_dim": 4, "n_positions": 64, "tie_word_embeddings": False,
}  # fmt: skip
ENCODER = {
    "model_type": "bert", "vocab_size": V, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
    "id2label": {"0": "a"},
}  # fmt: skip
SMALL = CONFIG | {"num_hidden_layers": 1}
CASES = {
    "untied": SMALL,
    "tied": SMALL | {"tie_word_embeddings": True},
    "a bias on the logits": GPTJ,
}
BATCH = {
    "ids": np.random.default_rng(0).integers(0, V, (3, 7)).astype(np.int32),
    "lengths": np.array([7, 4, 6], np.int32),
}


def loaded(path, config, **options):
    directory = path / "hf"
    if not directory.exists():
        write_hf(directory, config, tensors_of(config))
    return AutoModelForCausalLM.from_pretrained(directory, **options)


@functools.partial(jax.jit, static_argnums=0)
def logps_and_slopes(net, params):
    """Log-probs, entropies and top-1 flags, and the gradient of their sum."""

    def total(params):
        out = outputs(net, params, BATCH, temperature=0.7, entropy=True)
        return (out.logps + out.entropy).sum(), (out.logps, out.entropy, out.correct)

    return jax.grad(total, has_aux=True)(params)


def real(leaf, like):
    """What of a padded array is no padding, and what is."""
    inside = tuple(slice(size) for size in like.shape)
    rest = np.array(leaf)
    rest[inside] = 0
    return np.asarray(leaf)[inside], rest


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_no_logit_no_loss_no_gradient_and_no_sample(tmp_path, case):
    plain = loaded(tmp_path, CASES[case])
    padded = loaded(tmp_path, CASES[case], pad_vocab_to_multiple_of=64)
    assert (padded.net.spec.vocab_size, padded.net.spec.vocab_padding) == (V, 24)
    assert padded.num_parameters() == plain.num_parameters()
    ids = BATCH["ids"][:, :4]

    expected, found = plain(ids).logits, padded(ids).logits
    np.testing.assert_allclose(found[..., :V], expected, rtol=0, atol=1e-6)
    assert found.shape == (3, 4, 64)
    assert (np.asarray(found[..., V:]) == -np.inf).all()

    slopes, numbers = logps_and_slopes(plain.net, plain.params)
    padded_slopes, padded_numbers = logps_and_slopes(padded.net, padded.params)
    for one, other in zip(numbers, padded_numbers, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(slopes), jax.tree.leaves(padded_slopes), strict=True
    ):
        inside, beyond = real(other, one)
        np.testing.assert_allclose(inside, one, rtol=0, atol=2e-6, err_msg=str(path))
        assert not beyond.any(), path

    for options in ({"do_sample": True, "temperature": 3.0}, {"repetition_penalty": 1.5}):
        one, other = (
            model.generate(ids, max_new_tokens=8, eos_token_id=-1, **options)
            for model in (plain, padded)
        )
        np.testing.assert_array_equal(one, other)


def test_what_lies_in_the_padding_is_never_read(tmp_path):
    model = loaded(tmp_path, SMALL, pad_vocab_to_multiple_of=64)
    expected = logps_and_slopes(model.net, model.params)[1]
    params = dict(model.params)
    params["embed"] = {"table": model.params["embed"]["table"].at[V:].set(1e3)}
    params["head"] = {"kernel": model.params["head"]["kernel"].at[:, V:].set(1e3)}
    found = logps_and_slopes(model.net, params)[1]
    jax.tree.map(np.testing.assert_array_equal, expected, found)


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_have_no_padding_unless_asked(tmp_path, case):
    config = CASES[case]
    model = loaded(tmp_path, config, pad_vocab_to_multiple_of=64)
    model.save_pretrained(tmp_path / "real")
    tensors = load_file(tmp_path / "real" / "model.safetensors")
    written = tensors_of(config)
    assert tensors.keys() == written.keys()
    for name, value in written.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    assert json.loads((tmp_path / "real" / "config.json").read_text())["vocab_size"] == V

    model.save_pretrained(tmp_path / "all", keep_vocab_padding=True)
    tensors = load_file(tmp_path / "all" / "model.safetensors")
    rows = {name: len(value) for name, value in tensors.items() if len(value) == 64}
    assert rows.keys() == {n for n, value in written.items() if len(value) == V}
    assert json.loads((tmp_path / "all" / "config.json").read_text())["vocab_size"] == 64
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "all")
    assert again.net.spec.vocab_padding == 0


def test_rows_of_a_checkpoint_beyond_its_vocabulary_are_left_out(tmp_path):
    tensors = tensors_of(SMALL)
    expected = loaded(tmp_path, SMALL).params
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.concatenate((tensors[name], np.ones((8, 16), np.float32)))
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.warns(UserWarning, match=r"vocab_size=40.*embed_tokens.weight 48.*lm_head.*48"):
        found = loaded(tmp_path, SMALL).params
    jax.tree.map(np.testing.assert_array_equal, expected, found)


def test_an_odd_vocabulary_is_cut_over_a_mesh_once_it_is_padded(tmp_path):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    config = SMALL | {"vocab_size": 41}
    mesh = {"data": 1, "fsdp": 2, "tensor": 4}
    tables = [
        loaded(tmp_path, config, mesh=mesh, pad_vocab_to_multiple_of=n).params["embed"]["table"]
        for n in (1, 4)
    ]
    assert [table.addressable_shards[0].data.shape for table in tables] == [(41, 8), (11, 8)]
    np.testing.assert_array_equal(tables[1][:41], tables[0])
    assert not np.asarray(tables[1][41:]).any()


@pytest.mark.parametrize("case", CASES)
def test_a_larger_vocabulary_keeps_the_old_rows_and_adds_some_near_their_mean(tmp_path, case):
    model, before = loaded(tmp_path, CASES[case]), loaded(tmp_path, CASES[case]).params
    table = model.resize_token_embeddings(V + 3, pad_to_multiple_of=8)
    assert table.shape == (48, 16)
    assert (model.net.spec.vocab_size, model.net.spec.vocab_padding) == (V + 3, 5)
    rows = {"embed": ("table", lambda x: x), "head": ("kernel", lambda x: x.T)}
    for group in rows.keys() & before.keys():
        leaf, turn = rows[group]
        if leaf not in before[group]:
            continue
        old, new = (np.asarray(turn(p[group][leaf])) for p in (before, model.params))
        np.testing.assert_array_equal(new[:V], old)
        off = new[V : V + 3] - old.mean(axis=0)
        spread = old.std() * 1e-9**0.5
        assert 0 < np.abs(off).max() < 6 * spread
        assert not new[V + 3 :].any()
    if "bias" in before.get("head", {}):
        new = np.asarray(model.params["head"]["bias"])
        np.testing.assert_allclose(new[V : V + 3], before["head"]["bias"].mean(), rtol=1e-3)
    # New tokens can be written, padding cannot.
    assert np.isfinite(np.asarray(model(BATCH["ids"][:, :4]).logits)).sum() == 3 * 4 * (V + 3)


def test_a_smaller_vocabulary_and_no_change_at_all(tmp_path):
    model, before = loaded(tmp_path, SMALL), loaded(tmp_path, SMALL).params
    assert model.resize_token_embeddings() is model.params["embed"]["table"]
    assert model.resize_token_embeddings(pad_to_multiple_of=16).shape == (48, 16)
    assert model.resize_token_embeddings(21).shape == (21, 16)
    np.testing.assert_array_equal(model.params["embed"]["table"], before["embed"]["table"][:21])
    np.testing.assert_array_equal(model.params["head"]["kernel"], before["head"]["kernel"][:, :21])
    assert model.config.vocab_size == 21
    model.save_pretrained(tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].shape == (21, 16)


def test_new_rows_can_be_drawn_like_a_new_models(tmp_path):
    model = loaded(tmp_path, SMALL)
    table = model.resize_token_embeddings(V + 100, mean_resizing=False, seed=3)
    assert abs(float(table[V:].std()) / model.net.spec.initializer_range - 1) < 0.1
    assert abs(float(table[V:].mean())) < 0.003


def test_an_encoder_can_be_resized(tmp_path):
    write_hf(tmp_path / "hf", ENCODER, tensors_of(ENCODER))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    expected = model(BATCH["ids"]).logits
    model.resize_token_embeddings(V + 1, pad_to_multiple_of=8)
    np.testing.assert_allclose(model(BATCH["ids"]).logits, expected, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved["bert.embeddings.word_embeddings.weight"].shape == (V + 1, 16)


def test_an_adapter_that_trains_the_head_has_no_padding_in_its_file(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(loaded(tmp_path, SMALL, pad_vocab_to_multiple_of=64), config)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.lm_head.weight"].shape == (V, 16)
    again = PeftModel.from_pretrained(
        loaded(tmp_path, SMALL, pad_vocab_to_multiple_of=64), tmp_path / "adapter"
    )
    ids = BATCH["ids"][:, :4]
    np.testing.assert_array_equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ModelError, match="before it gets an adapter"):
        model.resize_token_embeddings(50)


@pytest.mark.parametrize("sizes", [{"new_num_tokens": 0}, {"pad_to_multiple_of": 0}])
def test_sizes_below_one_are_named_errors(tmp_path, sizes):
    with pytest.raises(ConfigError, match="at least"):
        loaded(tmp_path, SMALL).resize_token_embeddings(**sizes)


@pytest.mark.parity
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [V - 7, V + 5])
def test_resizing_agrees_with_transformers(tmp_path, tied, size):
    transformers = pytest.importorskip("transformers")
    model = loaded(tmp_path, SMALL | {"tie_word_embeddings": tied})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs.resize_token_embeddings(size)
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path / "out")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info
    assert again.config.vocab_size == theirs.config.vocab_size == size
    for name, tensor in theirs.state_dict().items():
        ours = again.state_dict()[name].numpy()
        # Both draw the new rows: they differ by the trace of spread alone.
        np.testing.assert_allclose(ours, tensor.numpy(), rtol=0, atol=2e-4, err_msg=name)
