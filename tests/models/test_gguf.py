"""GGUF files: tiny ones written with the gguf package, and SmolLM2."""

from __future__ import annotations

import json

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jrlhf.errors import JrlhfError, ModelError, UnsupportedModelError
from jrlhf.models.gguf_file import GGUFFile
from jrlhf.models.load import load_pretrained, save_pretrained
from jrlhf.models.tokenizer import load_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors_of(config):
    """Random tensors under Hugging Face's names."""
    rng = np.random.default_rng(0)
    d, f, e = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    h, k = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    attention = {"q_proj": (h * e, d), "k_proj": (k * e, d), "v_proj": (k * e, d)}
    attention |= {"o_proj": (d, h * e)}
    mlp = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    for i in range(config["num_hidden_layers"]):
        own = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{own}{norm}.weight"] = (d,)
        for room, group, bias in (("self_attn", attention, "attention"), ("mlp", mlp, "mlp")):
            for name, shape in group.items():
                shapes[f"{own}{room}.{name}.weight"] = shape
                if config[f"{bias}_bias"]:
                    shapes[f"{own}{room}.{name}.bias"] = shape[:1]
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def permute(weights, heads):
    """What llama.cpp's converter does to q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    rows = weights.shape[0]
    split = weights.reshape(heads, 2, rows // heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def their_name(name):
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def write_gguf(path, config, tensors, *, kind=Kind.F32, extra=None, metadata=None):
    """Writes a model as llama.cpp's converter would; returns what the file then holds."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    for key, value in (metadata or {}).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](
            key, value
        )
    held = {}
    for name, tensor in tensors.items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        part = name.split(".")[-2]
        stored = permute(tensor, config[heads[part]]) if part in heads else tensor
        form = kind if tensor.ndim == 2 else Kind.F32  # as the converter: vectors stay float32
        writer.add_tensor(their_name(name), quantize(stored, form), raw_dtype=form)
        held[name] = dequantize(quantize(tensor, form), form)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def write_hf(path, config, tensors):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def assert_same_model(ours, theirs):
    assert ours[0] == theirs[0]
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}]
)
def test_a_gguf_file_is_the_hugging_face_model_it_was_made_of(tmp_path, kind, changes):
    config = CONFIG | changes
    held = write_gguf(tmp_path / "m.gguf", config, tensors_of(config), kind=kind)
    ours = load_pretrained(tmp_path / "m.gguf")
    assert_same_model(ours, load_pretrained(write_hf(tmp_path / "hf", config, held)))
    assert ours[2].config == config

    net, params, source = ours
    with pytest.warns(UserWarning, match="saved without a tokenizer"):
        save_pretrained(tmp_path / "out", net, params, source=source)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == held.keys()
    for name, tensor in held.items():
        np.testing.assert_array_equal(saved[name], tensor, err_msg=name)


def test_every_device_reads_its_part_of_quantized_weights(tmp_path):
    write_gguf(tmp_path / "m.gguf", CONFIG, tensors_of(CONFIG), kind=Kind.Q4_1)
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def place(net, abstract):
        def cut(leaf):
            names = ["y", "x"]
            axes = [names.pop() if names and n % 4 == 0 else None for n in leaf.shape]
            return NamedSharding(mesh, PartitionSpec(*axes))

        return jax.tree.map(cut, abstract)

    cut = load_pretrained(tmp_path / "m.gguf", shardings=place)
    assert_same_model(cut, load_pretrained(tmp_path / "m.gguf"))
    assert not cut[1]["layers"]["attn"]["q"]["kernel"].is_fully_replicated


def llama3_divisors(rope, head_dim):
    """rope_freqs.weight as llama.cpp's converter computes it (generate_extra_tensors)."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    out = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        if wavelength < high:
            out.append(1)
        elif wavelength > low:
            out.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wavelength
                      - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"])  # fmt: skip
            out.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize(("factor", "theta"), [(8.0, 500000.0), (32.0, 500000.0), (8.0, 1e9)])
def test_llama3_rope_is_recovered_from_its_divisors(tmp_path, factor, theta):
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = CONFIG | {"rope_parameters": rope, "head_dim": 64, "num_hidden_layers": 1}
    freqs = {"rope_freqs.weight": llama3_divisors(rope, 64)}
    write_gguf(tmp_path / "m.gguf", config, tensors_of(config), extra=freqs)
    assert load_pretrained(tmp_path / "m.gguf")[2].config == config

    freqs = {"rope_freqs.weight": np.sqrt(freqs["rope_freqs.weight"])}
    write_gguf(tmp_path / "odd.gguf", config, tensors_of(config), extra=freqs)
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        load_pretrained(tmp_path / "odd.gguf")


def test_linear_rope_is_read(tmp_path):
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "m.gguf", CONFIG, tensors_of(CONFIG), metadata=scaling)
    rope = load_pretrained(tmp_path / "m.gguf")[0].spec.rope
    assert (rope.rope_type, rope.rope_theta, rope.factor) == ("linear", 500.0, 4.0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.rope.dimension_count": 4}, "rotates 4 of 8"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"split.count": 3}, "merge them"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, metadata, message):
    write_gguf(tmp_path / "m.gguf", CONFIG, tensors_of(CONFIG), metadata=metadata)
    with pytest.raises(UnsupportedModelError, match=message):
        load_pretrained(tmp_path / "m.gguf")


def test_another_architecture_is_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="mamba"):
        load_pretrained(tmp_path / "m.gguf")


def test_a_cut_or_flipped_file_never_raises_anything_but_our_errors(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, tensors_of(CONFIG), metadata={"general.name": "a model"})
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for size in [0, 3, 4, 8, 20, *rng.integers(24, len(content) - 1, 20)]:
        path.write_bytes(content[:size])
        with pytest.raises(ModelError):
            GGUFFile(path)
    table = content.index(b"blk.0.attn_norm")
    for position in rng.integers(0, table + 400, 150):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            file = GGUFFile(path)
        except JrlhfError:
            continue
        for tensor in file.tensors.values():
            assert tensor.data.nbytes <= len(content)


def test_metadata_and_tensors_are_what_the_packages_own_reader_finds(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, tensors_of(CONFIG), kind=Kind.Q8_0)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(str(path))
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        expected = dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.tensors[tensor.name].read(slice(None)), expected)


@pytest.fixture(scope="module")
def smollm2_model(smollm2):
    return load_pretrained(smollm2)


@pytest.mark.assets
def test_smollm2_knows_the_capital_of_france(smollm2, smollm2_model):
    net, params, source = smollm2_model
    tokenizer = load_tokenizer(smollm2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    width = len(prompt) + 12

    @jax.jit
    def following(params, ids, length):
        hidden = net.hidden(params, ids[None])[0, length - 1]
        return (hidden @ net.head(params)).argmax()

    ids = np.zeros(width, np.int32)
    ids[: len(prompt)] = prompt
    length = len(prompt)
    while length < width and ids[length - 1] != source.config["eos_token_id"]:
        ids[length] = following(params, ids, length)
        length += 1
    answer = tokenizer.decode(ids[len(prompt) : length])
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.assets
def test_smollm2s_config_is_that_of_the_original(smollm2_model):
    # HuggingFaceTB/SmolLM2-135M-Instruct, config.json.
    expected = {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    }  # fmt: skip
    config = smollm2_model[2].config
    assert {key: config[key] for key in expected} == expected
    leaves = jax.tree.leaves(smollm2_model[1])
    assert sum(leaf.size for leaf in leaves) == 134_515_008
