"""Files against transformers: what it saves we load, what we save it loads, bit for bit."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from jrlhf.auto import AutoModelForCausalLM, AutoModelForSequenceClassification
from jrlhf.models.load import load_pretrained
from jrlhf.models.save import save_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
# Tiny matrices: a second thread only spins.
torch.set_num_threads(1)

BASE = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases, llama3 rope": {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LLAMA3,
        "head_dim": 10,
    },
}
# No id 0: transformers takes the last token that is not padding for the end of the text.
IDS = np.random.default_rng(0).integers(1, 53, (2, 17))


def perturbed(kind, *, dtype=torch.float32, **changes):
    """A transformers model with every parameter, norms and biases too, off its start."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**BASE, **changes})
    config._attn_implementation = "eager"
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
            # Not model.to(dtype): that would also round the rotary frequencies.
            parameter.data = parameter.data.to(dtype)
    return model


@functools.partial(jax.jit, static_argnums=0)
def our_logits(net, params, ids):
    return net.hidden(params, ids) @ net.head(params)


@functools.partial(jax.jit, static_argnums=0)
def our_scores(net, params, ids, lengths):
    return net.scores(params, net.hidden(params, ids), lengths)


def their_logits(model, ids=IDS):
    with torch.no_grad():
        return model.double()(torch.tensor(ids)).logits.numpy()


def reload(kind, directory):
    """Loads in the file's own dtype; nothing may be missing, left over or of another shape."""
    model, info = kind.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    return model


def assert_bitwise_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", ["5GB", "8KB"])
def test_causal_models_pass_both_ways(tmp_path, case, size):
    model = perturbed(transformers.LlamaForCausalLM, **CASES[case])
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert (tmp_path / "theirs" / "model.safetensors").exists() == (size == "5GB")

    net, params, source = load_pretrained(tmp_path / "theirs")
    logits = our_logits(net, params, IDS)
    expected = their_logits(model)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    save_pretrained(tmp_path / "ours", net, params, source=source, max_shard_size=size)
    again = reload(transformers.LlamaForCausalLM, tmp_path / "ours")
    assert_bitwise_equal(again.state_dict(), state)
    assert (
        again.config.rope_parameters
        == transformers.LlamaConfig(**{**BASE, **CASES[case]}).rope_parameters
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes_both_ways(tmp_path, dtype):
    model = perturbed(transformers.LlamaForCausalLM, dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    net, params, source = load_pretrained(tmp_path / "theirs")
    logits = our_logits(net, params, IDS)
    expected = their_logits(model)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    save_pretrained(tmp_path / "ours", net, params, source=source, dtype=dtype)
    again = reload(transformers.LlamaForCausalLM, tmp_path / "ours")
    assert_bitwise_equal(again.state_dict(), state)


@pytest.mark.parametrize("labels", [1, 3])
def test_classifiers_pass_both_ways(tmp_path, labels):
    kind = transformers.LlamaForSequenceClassification
    model = perturbed(kind, num_labels=labels)
    model.save_pretrained(tmp_path / "theirs")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    net, params, source = load_pretrained(tmp_path / "theirs", head="classifier")
    assert net.spec.num_labels == labels
    lengths = np.array([17, 9])
    ids = np.where(np.arange(17) < lengths[:, None], IDS, 0)
    scores = our_scores(net, params, ids, lengths)
    expected = their_logits(model, ids)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    save_pretrained(tmp_path / "ours", net, params, source=source)
    assert_bitwise_equal(reload(kind, tmp_path / "ours").state_dict(), state)


def test_what_is_made_from_a_config_keeps_what_the_config_says(tmp_path):
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    names = {0: "bad", 1: "fair", 2: "good"}
    config = transformers.LlamaConfig(**BASE | special, id2label=names, problem_type="regression")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "scorer")
    model = reload(transformers.LlamaForSequenceClassification, tmp_path / "scorer")
    assert (model.config.id2label, model.config.problem_type) == (names, "regression")
    assert model.config.label2id == {"bad": 0, "fair": 1, "good": 2}
    assert model(torch.tensor(IDS)).logits.shape == (len(IDS), 3)  # needs the padding's id

    writer = AutoModelForCausalLM.from_config({"model_type": "llama", **BASE, **special})
    assert writer.eos_token_ids == [2]
    writer.save_pretrained(tmp_path / "writer")
    assert json.loads((tmp_path / "writer" / "generation_config.json").read_text()) == special


def test_a_reward_model_made_from_a_causal_one_loads_as_a_classifier(tmp_path):
    perturbed(transformers.LlamaForCausalLM).save_pretrained(tmp_path / "theirs")
    net, params, source = load_pretrained(tmp_path / "theirs", head="classifier", num_labels=1)
    save_pretrained(tmp_path / "ours", net, params, source=source)
    model = reload(transformers.AutoModelForSequenceClassification, tmp_path / "ours")
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.config.num_labels == 1
    scores = our_scores(net, params, IDS, np.array([17, 17]))
    np.testing.assert_allclose(scores, their_logits(model), rtol=0, atol=1e-5)


def test_a_value_head_is_saved_beside_the_model_as_trl_does(tmp_path):
    perturbed(transformers.LlamaForCausalLM).save_pretrained(tmp_path / "theirs")
    net, params, source = load_pretrained(tmp_path / "theirs", value_head=True)
    save_pretrained(tmp_path / "ours", net, params, source=source)
    model, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert set(info["unexpected_keys"]) == {"v_head.summary.weight", "v_head.summary.bias"}
    assert not info["missing_keys"]
    expected = their_logits(model)
    logits = our_logits(net, params, IDS)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_configs_of_transformers_4_mean_the_same(tmp_path):
    model = perturbed(transformers.LlamaForCausalLM, rope_parameters=LLAMA3)
    model.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    net, params, _ = load_pretrained(tmp_path / "theirs")
    logits = our_logits(net, params, IDS)
    expected = their_logits(model)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.assets
def test_glassllm_exports_to_transformers(glassllm, tmp_path):
    net, params, source = load_pretrained(glassllm)
    save_pretrained(tmp_path / "ours", net, params, source=source)
    model = reload(transformers.AutoModelForCausalLM, tmp_path / "ours")
    ids = np.random.default_rng(0).integers(4, 1024, (2, 128))
    expected = their_logits(model, ids)
    logits = our_logits(net, params, ids)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = "“Curiouser and curiouser!” cried Alice"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
