"""Reading and writing Hugging Face directories, without torch."""

from __future__ import annotations

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jrlhf.errors import (
    ConfigError,
    MissingFileError,
    MissingWeightError,
    ModelError,
    UnsupportedModelError,
)
from jrlhf.models.build import Net
from jrlhf.models.hf.reader import SafetensorsCheckpoint
from jrlhf.models.hf.writer import Tensor, plan_shards
from jrlhf.models.load import load_pretrained, open_checkpoint
from jrlhf.models.save import save_pretrained

CASES = {
    "untied": ({}, {}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {}),
    "classifier": ({"id2label": {"0": "a", "1": "b", "2": "c"}}, {"head": "classifier"}),
    "value head": ({}, {"value_head": True}),
    "frozen trunk": ({}, {"num_layers_unfrozen": 1}),
    "all frozen": ({}, {"num_layers_unfrozen": 0}),
}


def spec_choices(choices):
    return {key: value for key, value in choices.items() if key != "num_layers_unfrozen"}


def read_all(directory):
    return {k: v for f in directory.glob("*.safetensors") for k, v in load_file(f).items()}


def leaves(params):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shards", [1, 3])
def test_saving_what_was_loaded_gives_the_same_tensors(hf_directory, tmp_path, case, shards):
    changes, choices = CASES[case]
    origin, tensors = hf_directory(shards=shards, choices=spec_choices(choices), **changes)
    net, params, source = load_pretrained(origin, **choices)
    save_pretrained(tmp_path / "copy", net, params, source=source)
    saved = read_all(tmp_path / "copy")
    assert saved.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float64"])
def test_half_precision_files_load_exactly_into_float32_masters(hf_directory, tmp_path, stored):
    origin, tensors = hf_directory(dtype=stored)
    net, params, source = load_pretrained(origin)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    save_pretrained(tmp_path / "f32", net, params, source=source)
    for name, value in read_all(tmp_path / "f32").items():
        np.testing.assert_array_equal(value, tensors[name].astype(np.float32))
    if stored != "float64":
        save_pretrained(tmp_path / "half", net, params, source=source, dtype=stored)
        for name, value in read_all(tmp_path / "half").items():
            np.testing.assert_array_equal(value.view(np.uint16), tensors[name].view(np.uint16))
        assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == stored


def test_params_can_be_loaded_as_bfloat16(hf_directory):
    origin, tensors = hf_directory()
    found = load_pretrained(origin, param_dtype="bfloat16")[1]["norm"]["scale"]
    np.testing.assert_array_equal(found, tensors["model.norm.weight"].astype(ml_dtypes.bfloat16))


def cut_everything(mesh, *, from_the_end=False):
    """Shardings that cut every axis which divides, each leaf along as many mesh axes as fit."""

    def sharding(leaf):
        names = list(mesh.axis_names)
        axes: list[str | None] = [None] * leaf.ndim
        order = range(leaf.ndim)
        for axis in reversed(order) if from_the_end else order:
            fits = [name for name in names if leaf.shape[axis] % mesh.shape[name] == 0]
            if fits:
                axes[axis] = fits[0]
                names.remove(fits[0])
        return NamedSharding(mesh, PartitionSpec(*axes))

    return lambda net, abstract: jax.tree.map(sharding, abstract)


# (3, 2) cuts the stack of three layers and, from the end, inside heads of six: there one device's
# part is no rectangle of the file.
@pytest.mark.parametrize("from_the_end", [False, True])
@pytest.mark.parametrize("shape", [(2, 4), (8, 1), (3, 2)])
def test_loading_onto_many_devices_gives_the_same_params(hf_directory, shape, from_the_end):
    count = shape[0] * shape[1]
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} devices")
    origin, _ = hf_directory(attention_bias=True, choices={"value_head": True})
    mesh = jax.make_mesh(
        shape, ("x", "y"), devices=jax.devices()[:count], axis_types=(AxisType.Auto,) * 2
    )
    place = cut_everything(mesh, from_the_end=from_the_end)
    net, params, _ = load_pretrained(origin, value_head=True, shardings=place)
    _, whole, _ = load_pretrained(origin, value_head=True)
    asked = leaves(place(net, net.abstract()))
    expected = leaves(whole)
    for name, leaf in leaves(params).items():
        assert leaf.sharding.is_equivalent_to(asked[name], leaf.ndim), name
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(params))


def test_each_device_reads_only_its_slice(hf_directory, monkeypatch):
    origin, tensors = hf_directory()
    reads: list[tuple[str, int]] = []
    read = SafetensorsCheckpoint.read

    def recorded(self, name, index, shape):
        part = read(self, name, index, shape)
        reads.append((name, part.size))
        return part

    monkeypatch.setattr(SafetensorsCheckpoint, "read", recorded)
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    load_pretrained(origin, shardings=cut_everything(mesh))
    for name, value in tensors.items():
        sizes = [size for read_name, size in reads if read_name == name]
        assert sizes == [value.size // 2] * 2, name


def test_one_error_lists_every_weight_that_is_missing_unexpected_or_misshapen(hf_directory):
    origin, tensors = hf_directory()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    del tensors["lm_head.weight"]
    tensors["model.layers.2.self_attn.q_norm.weight"] = np.zeros(6, np.float32)
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
    tensors["model.norm.weight"] = np.zeros(17, np.float32)
    save_file(tensors, origin / "model.safetensors")
    with pytest.raises(MissingWeightError) as caught:
        load_pretrained(origin)
    message = str(caught.value)
    assert "(5 differences)" in message
    assert "missing: model.layers.1.mlp.up_proj.weight" in message
    assert "missing: lm_head.weight" in message
    assert "unexpected: model.layers.2.self_attn.q_norm.weight" in message
    assert "unexpected: model.layers.3.mlp.up_proj.weight" in message
    assert "shape of model.norm.weight is (17,), expected (16,)" in message


def test_weights_of_heads_that_are_not_used_are_no_error(hf_directory):
    origin, tensors = hf_directory(choices={"value_head": True}, tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # some tied files carry it
    tensors["score.weight"] = np.zeros((5, 16), np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    save_file(tensors, origin / "model.safetensors")
    _, params, _ = load_pretrained(origin)
    assert set(params) == {"embed", "layers", "norm"}


def test_a_classifier_on_a_causal_model_draws_its_score_head(hf_directory, caplog):
    origin, _ = hf_directory()
    key = jax.random.key(7)
    net, params, _ = load_pretrained(origin, head="classifier", num_labels=3, key=key)
    fresh = jax.jit(lambda k: Net(net.spec).init(k)["score"])(key)
    np.testing.assert_allclose(params["score"]["kernel"], fresh["kernel"], rtol=1e-6)
    assert "head" not in params
    assert "Not read from the checkpoint, drawn at random: score." in caplog.text
    again = load_pretrained(origin, head="classifier", num_labels=3, key=jax.random.key(8))[1]
    assert not np.array_equal(again["score"]["kernel"], params["score"]["kernel"])


def test_a_score_head_of_another_size_is_an_error_not_a_new_head(hf_directory):
    origin, _ = hf_directory(
        choices={"head": "classifier"}, id2label={"0": "a", "1": "b", "2": "c"}
    )
    with pytest.raises(MissingWeightError, match=r"score.weight is \(3, 16\), expected \(1, 16\)"):
        load_pretrained(origin, head="classifier", num_labels=1)


def test_a_bare_trunk_loads_as_a_classifier(hf_directory):
    origin, tensors = hf_directory()
    bare = {name.removeprefix("model."): t for name, t in tensors.items() if "lm_head" not in name}
    whole = load_pretrained(origin, head="classifier")[1]
    save_file(bare, origin / "model.safetensors")
    params = load_pretrained(origin, head="classifier")[1]
    for name, leaf in leaves(whole).items():
        np.testing.assert_array_equal(leaves(params)[name], leaf)


def test_a_frozen_trunk_holds_the_lower_layers(hf_directory):
    origin, _ = hf_directory()
    whole = load_pretrained(origin)[1]["layers"]
    params = load_pretrained(origin, num_layers_unfrozen=1)[1]
    for name, leaf in leaves(whole).items():
        parts = [leaves(params[stack])[name] for stack in ("trunk", "layers")]
        assert [len(part) for part in parts] == [2, 1]
        np.testing.assert_array_equal(np.concatenate(parts), leaf)


@pytest.mark.parametrize("number", [-2, 4])
def test_more_unfrozen_layers_than_there_are_is_an_error(hf_directory, number):
    with pytest.raises(ConfigError, match="3 layers"):
        load_pretrained(hf_directory()[0], num_layers_unfrozen=number)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "c:\\x.safetensors",
     "x\0.safetensors", "..", "", ".safetensors", "x.bin", None, 3],
)  # fmt: skip
def test_an_index_can_only_name_plain_files_of_its_directory(hf_directory, name):
    origin, tensors = hf_directory(shards=2)
    index = {"weight_map": dict.fromkeys(tensors, name)}
    (origin / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="plain"):
        open_checkpoint(origin)


def test_absent_shards_are_all_named(hf_directory):
    origin, _ = hf_directory(shards=3)
    (origin / "model-00001-of-00003.safetensors").unlink()
    (origin / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"00001-of-00003.*00003-of-00003"):
        load_pretrained(origin)


@pytest.mark.parametrize("damage", ["cut", "empty", "header"])
def test_a_damaged_file_is_a_named_error(hf_directory, damage):
    origin, _ = hf_directory()
    file = origin / "model.safetensors"
    content = file.read_bytes()
    bad = {"cut": content[: len(content) // 2], "empty": b"", "header": b"\xff" * len(content)}
    file.write_bytes(bad[damage])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a readable"):
        load_pretrained(origin)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_damaged_config_is_a_named_error(hf_directory, text):
    origin, _ = hf_directory()
    (origin / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        load_pretrained(origin)


def test_quantized_tensors_are_refused_by_name(hf_directory):
    origin, tensors = hf_directory()
    tensors["model.norm.weight"] = np.zeros(16, np.int8)
    save_file(tensors, origin / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight.* I8"):
        load_pretrained(origin)


def test_a_directory_with_pickled_weights_says_what_to_do(hf_directory):
    origin, _ = hf_directory()
    (origin / "model.safetensors").rename(origin / "pytorch_model.bin")
    with pytest.raises(MissingFileError, match=r"pytorch_model\.bin: convert them"):
        load_pretrained(origin)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere.gguf", "a/b/c", "a b"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name):
    with pytest.raises(MissingFileError, match="does not exist"):
        load_pretrained(name)


def test_a_hub_id_without_a_hub_is_a_named_error():
    with pytest.raises(MissingFileError, match=r"no-such-org/no-such-model.*hub"):
        load_pretrained("no-such-org/no-such-model")


def test_an_empty_directory_and_an_odd_file_are_named_errors(tmp_path):
    with pytest.raises(MissingFileError, match=r"config\.json"):
        load_pretrained(tmp_path)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UnsupportedModelError, match=r"model\.onnx"):
        load_pretrained(tmp_path / "model.onnx")


def test_shards_are_as_full_as_the_limit_allows():
    tensors = [Tensor("a", 60), Tensor("b", 40), Tensor("c", 101), Tensor("d", 1)]
    assert list(plan_shards(tensors, 100).values()) == [["a", "b"], ["c"], ["d"]]
    assert plan_shards(tensors, 202) == {"model.safetensors": ["a", "b", "c", "d"]}


def test_sharded_files_obey_the_limit_and_the_index_finds_every_tensor(hf_directory, tmp_path):
    origin, tensors = hf_directory()
    net, params, source = load_pretrained(origin)
    save_pretrained(tmp_path / "s", net, params, source=source, max_shard_size="5KB")
    index = json.loads((tmp_path / "s" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert files == {f.name for f in (tmp_path / "s").glob("*.safetensors")}
    for file in files:
        held = load_file(tmp_path / "s" / file)
        assert sum(value.nbytes for value in held.values()) <= 5000
        assert all(index["weight_map"][name] == file for name in held)


@pytest.mark.parametrize(("first", "then"), [("5KB", "5GB"), ("5GB", "5KB"), ("5KB", "20KB")])
def test_a_second_save_leaves_nothing_of_the_first(hf_directory, tmp_path, first, then):
    net, params, source = load_pretrained(hf_directory()[0])
    save_pretrained(tmp_path / "s", net, params, source=source, max_shard_size=first)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    save_pretrained(tmp_path / "s", net, doubled, source=source, max_shard_size=then)
    again = load_pretrained(tmp_path / "s")[1]
    for name, leaf in leaves(doubled).items():
        np.testing.assert_array_equal(leaves(again)[name], leaf)
    files = {file.name for file in (tmp_path / "s").iterdir()}
    assert ("model.safetensors" in files) == (then == "5GB")
    assert ("model.safetensors.index.json" in files) == (then != "5GB")
    assert not any(name.startswith(".") for name in files)


def test_saving_over_the_directory_it_came_from_works(hf_directory):
    origin, _ = hf_directory(shards=2)
    net, params, source = load_pretrained(origin)
    save_pretrained(origin, net, jax.tree.map(lambda leaf: -leaf, params), source=source)
    again = load_pretrained(origin)[1]
    for name, leaf in leaves(params).items():
        np.testing.assert_array_equal(leaves(again)[name], -leaf)


def test_the_config_keeps_what_the_spec_does_not_decide(hf_directory, tmp_path):
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    origin, _ = hf_directory(
        rope_parameters=llama3, torch_dtype="bfloat16", my_key=1, auto_map={"AutoModel": "x.y"}
    )
    (origin / "generation_config.json").write_text('{"eos_token_id": [2, 3], "top_p": 0.9}')
    net, params, source = load_pretrained(origin)
    save_pretrained(tmp_path / "s", net, params, source=source)
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["rope_parameters"] == config["rope_scaling"] == llama3
    assert (config["my_key"], config["eos_token_id"], config["dtype"]) == (1, 2, "float32")
    assert not config.keys() & {"auto_map", "torch_dtype"}
    generation = json.loads((tmp_path / "s" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 3], "top_p": 0.9}
    assert load_pretrained(tmp_path / "s")[0] == net


@pytest.mark.parametrize(
    ("choices", "labels"),
    [
        ({"head": "classifier"}, ["no", "yes"]),
        ({"head": "classifier", "num_labels": 1}, ["LABEL_0"]),
        ({"head": "causal"}, None),
    ],
)
def test_labels_keep_their_names_while_they_fit(hf_directory, tmp_path, choices, labels):
    names = {"0": "no", "1": "yes"}
    origin, _ = hf_directory(id2label=names, label2id={"no": 0, "yes": 1})
    net, params, source = load_pretrained(origin, **choices)
    save_pretrained(tmp_path / "s", net, params, source=source)
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert (list(config["id2label"].values()) if "id2label" in config else None) == labels
    assert (list(config["label2id"]) if "label2id" in config else None) == labels


def test_files_say_the_layout_that_transformers_4_asks_for(hf_directory, tmp_path):
    net, params, source = load_pretrained(hf_directory()[0])
    save_pretrained(tmp_path / "s", net, params, source=source)
    with safe_open(tmp_path / "s" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_unknown_dtype_is_refused_before_anything_is_written(hf_directory, tmp_path):
    net, params, _ = load_pretrained(hf_directory()[0])
    with pytest.raises(ConfigError, match="int8"):
        save_pretrained(tmp_path / "s", net, params, dtype="int8")
    assert not (tmp_path / "s").exists()


def test_float16_is_refused_where_it_would_write_infinities(hf_directory, tmp_path):
    net, params, _ = load_pretrained(hf_directory()[0])
    params["norm"]["scale"] = params["norm"]["scale"].at[3].set(7e4)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has values beyond float16"):
        save_pretrained(tmp_path / "s", net, params, dtype="float16")
    assert not list((tmp_path / "s").iterdir())
    save_pretrained(tmp_path / "s", net, params, dtype="bfloat16")
