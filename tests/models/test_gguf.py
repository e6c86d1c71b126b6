"""GGUF files: tiny ones written with the gguf package, and SmolLM2."""

from __future__ import annotations

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from jrlhf.errors import JrlhfError, ModelError, UnsupportedModelError
from jrlhf.models.families import spec_from_config
from jrlhf.models.gguf_file import GGUFFile
from jrlhf.models.load import load_pretrained, open_checkpoint
from jrlhf.models.match import match
from jrlhf.models.save import save_pretrained
from jrlhf.models.tokenizer import load_tokenizer
from jrlhf.rollout.score import outputs
from tests.models.conftest import tensors_of
from tests.models.gguf_cases import CONFIG, CONFIGS, write_gguf, write_hf


def assert_same_model(ours, theirs):
    assert ours[0] == theirs[0]
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])


@pytest.mark.parametrize(
    "kind",
    [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1],
)
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


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("qwen3", {"attention_bias": True}),
        ("gemma3", {}),
        ("gemma3", {"tie_word_embeddings": False}),
    ],
)
def test_other_architectures_are_their_hugging_face_models(tmp_path, arch, changes, kind):
    config = CONFIGS[arch] | changes
    held = write_gguf(tmp_path / "m.gguf", config, tensors_of(config), kind=kind, arch=arch)
    ours = load_pretrained(tmp_path / "m.gguf")
    assert ours[2].config == config
    assert_same_model(ours, load_pretrained(write_hf(tmp_path / "hf", config, held)))


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_quantizations_with_super_blocks_are_read(tmp_path, kind):
    config = CONFIG | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64,
                       "num_hidden_layers": 1}  # fmt: skip
    held = write_gguf(tmp_path / "m.gguf", config, tensors_of(config), kind=kind)
    sizes = [np.abs(value).max() for value in held.values()]
    assert all(0 < size < 10 for size in sizes)
    ours = load_pretrained(tmp_path / "m.gguf")
    assert_same_model(ours, load_pretrained(write_hf(tmp_path / "hf", config, held)))


GEMMA_KEYS = {
    "no window": ({}, {"sliding_window": 0}, ["full_attention"] * 7, 10000.0, 8),
    "another pattern": (
        {"gemma3.attention.sliding_window_pattern": 2},
        {},
        ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"],
        10000.0,
        8,
    ),
    "another local rotation": (
        {"gemma3.rope.freq_base_swa": 77.0},
        {},
        CONFIGS["gemma3"]["layer_types"],
        77.0,
        8,
    ),
}


@pytest.mark.parametrize("case", GEMMA_KEYS)
def test_what_a_gemma_file_says_of_its_windows(tmp_path, case):
    metadata, changes, types, theta, scalar = GEMMA_KEYS[case]
    config = CONFIGS["gemma3"] | changes
    write_gguf(tmp_path / "m.gguf", config, tensors_of(config), metadata=metadata, arch="gemma3")
    found = load_pretrained(tmp_path / "m.gguf")[2].config
    assert found["layer_types"] == types
    assert found["rope_parameters"]["sliding_attention"]["rope_theta"] == theta
    assert found["query_pre_attn_scalar"] == scalar


def test_the_largest_gemma_divides_queries_by_its_width(tmp_path):
    # google/gemma-3-27b: 62 layers, hidden 5376, 32 heads of 128, query_pre_attn_scalar 168.
    config = CONFIGS["gemma3"] | {"num_hidden_layers": 62, "layer_types": None}
    config |= {"hidden_size": 40, "num_attention_heads": 4}
    write_gguf(tmp_path / "m.gguf", config, tensors_of(config), arch="gemma3")
    assert load_pretrained(tmp_path / "m.gguf")[2].config["query_pre_attn_scalar"] == 10


@pytest.mark.parity
@pytest.mark.parametrize("arch", CONFIGS)
def test_transformers_reads_the_same_from_the_same_file(tmp_path, arch):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = CONFIGS[arch] | {"tie_word_embeddings": True}
    write_gguf(tmp_path / "m.gguf", config, tensors_of(config), kind=Kind.Q8_0, arch=arch)
    # It does not read the size of Qwen3's heads and Gemma's two rotations from the file.
    kinds = {"qwen3": transformers.Qwen3Config, "gemma3": transformers.Gemma3TextConfig}
    own = {"config": kinds[arch](**config)} if arch in kinds else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, **own
    ).eval()
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (2, 13))
    with torch.no_grad():
        expected = theirs.double()(torch.tensor(ids)).logits.numpy()
    net, params, _ = load_pretrained(tmp_path / "m.gguf")
    logits = jax.jit(lambda p: net.logits(p, net.hidden(p, ids)))(params)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


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


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_rotations_are_read(tmp_path, kind):
    scaling = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0}
    scaling["llama.rope.scaling.original_context_length"] = 24
    write_gguf(tmp_path / "m.gguf", CONFIG, tensors_of(CONFIG), metadata=scaling)
    rope = load_pretrained(tmp_path / "m.gguf")[0].spec.rope
    assert (rope.rope_type, rope.rope_theta, rope.factor) == (kind, 500.0, 4.0)
    assert kind == "linear" or rope.original_max_position_embeddings == 24


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
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
            checkpoint = open_checkpoint(path)
            match(checkpoint, spec_from_config(checkpoint.config))
        except JrlhfError:
            continue
        for tensor in file.tensors.values():
            assert tensor.data.nbytes <= len(content)


@pytest.mark.parametrize("layers", [0, 2**31 - 1, 10**30])
def test_more_layers_than_tensors_are_named_at_once(tmp_path, layers):
    changed = CONFIG | {"num_hidden_layers": layers}
    hf = write_hf(tmp_path / "hf", changed, tensors_of(CONFIG))
    with pytest.raises(ModelError, match=f"num_hidden_layers={layers}"):
        load_pretrained(hf)
    if layers < 2**32:
        path = tmp_path / "m.gguf"
        write_gguf(path, CONFIG, tensors_of(CONFIG), metadata={"llama.block_count": layers})
        with pytest.raises(ModelError, match=f"llama.block_count={layers} and"):
            load_pretrained(path)


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


@pytest.mark.parity
@pytest.mark.assets
def test_smollm2_has_transformers_bits_per_byte(smollm2, smollm2_model, repository):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    text = (repository / "LICENSE").read_text(encoding="utf-8")[:2200]
    ids = np.array([load_tokenizer(smollm2)(text)["input_ids"]])
    assert ids.shape[1] > 400
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    with torch.no_grad():
        nats = theirs(torch.tensor(ids), labels=torch.tensor(ids)).loss.item()
    net, params, _ = smollm2_model
    batch = {"ids": ids, "lengths": np.array([ids.shape[1]])}
    logps = jax.jit(lambda p: outputs(net, p, batch).logps)(params)
    per_byte = 1 / np.log(2) / len(text.encode())
    expected = nats * (ids.shape[1] - 1) * per_byte
    found = -float(logps.sum()) * per_byte
    assert 0 < expected < 1  # it knows English and this licence
    print(f"bits per byte: {found:.7f}, transformers {expected:.7f}")  # noqa: T201 (docs/checkpoints.md)
    assert abs(found - expected) < 0.005, (found, expected)
