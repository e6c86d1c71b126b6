"""What a user may type at a model and cannot mean: named errors, no tracebacks."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jrlhf import AutoModelForCausalLM, AutoModelForSequenceClassification
from jrlhf.errors import (
    ConfigError,
    JrlhfError,
    MeshError,
    MissingWeightError,
    ModelError,
    UnsupportedFieldError,
    UnsupportedModelError,
)
from jrlhf.models.families import spec_from_config
from jrlhf.models.load import load_pretrained
from jrlhf.peft import LoraConfig, PeftModel, get_peft_model
from tests.models.conftest import CONFIG, tensors_of, write_hf
from tests.models.test_encoders import BERT

LONG = {"rope_type": "longrope", "original_max_position_embeddings": 12}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("model"), CONFIG, tensors_of(CONFIG))


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_config(CONFIG)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mesh": 3}, "written as data=1,fsdp=4 or as a mapping of sizes, got 3"),
        ({"mesh": ["fsdp"]}, r"got \['fsdp'\]"),
        ({"seed": "a"}, "seed must be a whole number below .*, got 'a'"),
        ({"load_in_8bit": "yes"}, "load_in_8bit must be True or False, got 'yes'"),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, "both given: leave one out"),
    ],
)
def test_arguments_of_from_pretrained(directory: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, MeshError), match=says):
        AutoModelForCausalLM.from_pretrained(directory, **fields)


@pytest.mark.parametrize("name", [None, 3, ["a"]])
def test_a_model_is_named_by_text(name: Any) -> None:
    with pytest.raises(ConfigError, match="named by a path or a hub id, got"):
        AutoModelForCausalLM.from_pretrained(name)


@pytest.mark.parametrize("labels", [-1, 0, 1.5, "8", True])
def test_labels_are_counted(directory: Path, labels: Any) -> None:
    for make in (
        lambda **more: AutoModelForSequenceClassification.from_pretrained(directory, **more),
        lambda **more: AutoModelForSequenceClassification.from_config(CONFIG, **more),
    ):
        with pytest.raises(
            UnsupportedModelError, match=r"num_labels=.* must be at least 1, a whole"
        ):
            make(num_labels=labels)


@pytest.mark.parametrize(
    ("config", "fields", "says"),
    [
        (CONFIG, {"foo": 1}, "from_config has no argument 'foo'"),
        (CONFIG, {"sed": 1}, 'Did you mean "seed"'),
        (CONFIG, {"seed": 1.5}, "seed must be a whole number"),
        (None, {}, "takes a transformers config or a config.json's dict, got None"),
        ("llama", {}, "got 'llama'"),
    ],
)
def test_arguments_of_from_config(config: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AutoModelForCausalLM.from_config(config, **fields)


def test_from_config_takes_types_as_from_pretrained_does() -> None:
    for fields in ({"dtype": jnp.bfloat16}, {"torch_dtype": "bfloat16"}, {"dtype": "bf16"}):
        made = AutoModelForCausalLM.from_config(CONFIG, **fields)
        assert made.net.spec.dtype == "bfloat16"


@pytest.mark.parametrize("size", ["70", 1.5, 0, -1])
def test_a_vocabulary_is_counted(model: Any, size: Any) -> None:
    with pytest.raises(ConfigError, match=r"at least one token, a whole number, got"):
        model.resize_token_embeddings(size)


def test_positions_belong_to_tokens(model: Any) -> None:
    ids = np.ones((2, 5), np.int32)
    one = model(ids, position_ids=np.arange(5)[None]).logits
    np.testing.assert_array_equal(one, model(ids).logits)
    for wrong in (np.arange(4)[None], np.arange(5), np.ones((3, 5), int)):
        with pytest.raises(ModelError, match=r"position_ids .* and input_ids \(2, 5\) differ"):
            model(ids, position_ids=wrong)
    with pytest.raises(ModelError, match=r"input_ids of shape \(1, 0\) hold no token"):
        model(np.zeros((1, 0), int))


def test_adapters_are_named_by_text(model: Any) -> None:
    adapted = get_peft_model(model, LoraConfig(r=2))
    with pytest.raises(ConfigError, match="set_adapter takes a name or several, got 3"):
        adapted.set_adapter(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ({"rope_type": "linear", "factor": 0}, "factor=0.0 must be above 0"),
        ({"rope_type": "linear", "factor": -1.0}, "factor=-1.0 must be above 0"),
        ({"rope_type": "default", "rope_theta": -5}, "rope_theta=-5.0 must be above 0"),
        ({**LONG, "short_factor": [1.0] * 3, "long_factor": [1.0] * 2}, "long_factor has 2"),
        ({**LONG, "short_factor": [1.0] * 3, "long_factor": [1.0, 0.0, 2.0]}, "long_factor=0.0"),
        ({**LONG, "short_factor": [1.0] * 3, "long_factor": []}, "long_factor has 0 entries"),
        ({**LONG, "short_factor": [1.0], "long_factor": [1.0]}, "expected 3: one for each pair"),
        ({**LONG, "short_factor": 1.0, "long_factor": 2.0}, "rope_parameters="),
    ],
)
def test_rotations_that_cannot_be(rope: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        spec_from_config(CONFIG | {"rope_parameters": rope})


def test_both_rotations_of_a_model_are_looked_at() -> None:
    short = {**LONG, "short_factor": [1.0], "long_factor": [1.0]}
    ropes = {"full_attention": {"rope_type": "default"}, "sliding_attention": short}
    with pytest.raises(ModelError, match="short_factor has 1 entries, expected 3"):
        spec_from_config(CONFIG | {"model_type": "gemma3_text", "rope_parameters": ropes})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("tie_word_embeddings", "false", "'false' must be bool"),
        ("hidden_size", 32.7, "32.7 must be int"),
        ("rms_norm_eps", "small", "'small' must be float"),
        ("attention_bias", 1, "1 must be bool"),
    ],
)
def test_values_of_another_kind(key: str, value: Any, says: str) -> None:
    with pytest.raises(ModelError, match=f"{key}={says}"):
        spec_from_config(CONFIG | {key: value})
    assert spec_from_config(CONFIG | {"hidden_size": 16.0}).hidden_size == 16


def test_a_vocabulary_that_the_config_understates(tmp_path: Path) -> None:
    """Rows beyond it are padding; of a width that cannot be, an error names the tensor."""
    tensors = tensors_of(CONFIG)
    path = write_hf(tmp_path / "less", CONFIG | {"vocab_size": 33}, tensors)
    with pytest.warns(UserWarning, match="more rows of"):
        _, params, _ = load_pretrained(path)
    table = tensors["model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["embed"]["table"], table[:33])
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["lm_head.weight"][:33].T)
    more = write_hf(tmp_path / "more", CONFIG | {"vocab_size": 41}, tensors)
    with pytest.raises(JrlhfError, match=r"shape of model.embed_tokens.weight is \(40, 16\)"):
        load_pretrained(more)


def test_a_head_that_is_not_the_embedding_it_should_be_is_kept(tmp_path: Path) -> None:
    tensors = tensors_of(CONFIG)
    path = write_hf(tmp_path / "other", CONFIG | {"tie_word_embeddings": True}, tensors)
    with pytest.warns(UserWarning, match=r"holds a lm_head.weight that is not its embedding"):
        net, params, _ = load_pretrained(path)
    assert not net.spec.tie_word_embeddings
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["lm_head.weight"].T)
    same = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    path = write_hf(tmp_path / "same", CONFIG | {"tie_word_embeddings": True}, same)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net, params, _ = load_pretrained(path)
    assert net.spec.tie_word_embeddings
    assert "head" not in params


def test_patterns_that_overlap_keep_their_order(model: Any, tmp_path: Path) -> None:
    """The first that fits a module wins, also after a save."""
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={r"layers\.0\..*": 3, "down_proj": 1},
        alpha_pattern={r"layers\.0\..*": 30, "down_proj": 1},
        init_lora_weights=False,
    )
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(model, tmp_path / "adapter")
    ids = np.arange(14).reshape(2, 7)
    np.testing.assert_array_equal(adapted(ids).logits, again(ids).logits)


def test_what_peft_puts_beside_embeddings_is_named(model: Any, tmp_path: Path) -> None:
    get_peft_model(model, LoraConfig(r=2)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    save_file(load_file(file) | {name: np.zeros((2, 40), np.float32)}, file)
    with pytest.raises(MissingWeightError, match=r"(?s)unexpected: .*Low-rank paths beside embed"):
        PeftModel.from_pretrained(model, tmp_path)


@pytest.mark.parametrize("kind", ["eva", "orthogonal", "pissa"])
def test_a_saved_adapter_may_have_begun_in_another_way(
    model: Any, tmp_path: Path, kind: str
) -> None:
    """What it drew is in its file; only what also changed the base is refused."""
    made = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False))
    made.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    more = {"init_lora_weights": kind, "eva_config": {"rho": 2.0} if kind == "eva" else None}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    if kind == "pissa":
        with pytest.raises(UnsupportedFieldError, match="it changes the base"):
            PeftModel.from_pretrained(model, tmp_path)
        return
    again = PeftModel.from_pretrained(model, tmp_path)
    ids = np.arange(6)[None]
    np.testing.assert_array_equal(again(ids).logits, made(ids).logits)


def test_a_large_part_is_joined_on_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jrlhf.models import pieces

    path = write_hf(tmp_path / "model", CONFIG, tensors_of(CONFIG))
    whole = AutoModelForCausalLM.from_pretrained(path)
    largest = []
    read = pieces._read_part

    def recorded(*arguments: Any) -> np.ndarray:
        part = read(*arguments)
        largest.append(part.nbytes)
        return part

    monkeypatch.setattr(pieces, "_read_part", recorded)
    monkeypatch.setattr(pieces, "_HELD", 1000)
    for mesh in (None, "data=8", "data=2,fsdp=2,tensor=2"):
        largest.clear()
        made = AutoModelForCausalLM.from_pretrained(path, mesh=mesh)
        jax.tree.map(np.testing.assert_array_equal, made.params, whole.params)
        # A row of the first axis is the least: here a layer of the MLP.
        assert max(largest) <= max(1000, 4 * 16 * 24)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"subfolder": "x"}, "subfolder is not supported: give the directory itself"),
        ({"token": "x"}, "HF_TOKEN"),
        ({"config": {}}, "from_config"),
        ({"device_map": "auto"}, "mesh="),
        ({"trust_remote_code": True}, "never runs code"),
        ({"quantization_config": {}}, "load_in_8bit=True"),
        ({"num_labels": 2}, "AutoModelForSequenceClassification"),
        ({"problem_type": "regression"}, "the trainer's loss decides"),
        ({"dtype": "float16"}, "give bfloat16"),
        ({"dtype": ""}, "dtype must be float32 or bfloat16, got ''"),
        ({"revision": "v2"}, "revision='v2': .* lies here, and has no revisions"),
        ({"remta": "full"}, "has no argument 'remta'. Did you mean \"remat\""),
    ],
)
def test_arguments_of_from_pretrained_that_are_none_say_what_to_write(
    directory: Path, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        AutoModelForCausalLM.from_pretrained(directory, **fields)


def test_a_config_by_place_is_not_taken_for_something_else(directory: Path) -> None:
    with pytest.raises(ConfigError, match="one argument by place"):
        AutoModelForCausalLM.from_pretrained(directory, CONFIG)


def test_arguments_that_ask_for_what_happens_anyway_are_taken(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        directory, device_map=None, trust_remote_code=False, quantization_config=None, dtype=None,
        low_cpu_mem_usage=True, use_safetensors=True, use_cache=False, revision=None, token=None,
        subfolder="", output_loading_info=False,
    )  # fmt: skip
    ids = np.ones((1, 3), np.int32)
    plain = model(ids, labels=None, use_cache=False, return_dict=True).logits
    np.testing.assert_array_equal(plain, model(ids).logits)
    model.generate(ids, max_new_tokens=1, num_beams=1, use_cache=True, generation_config=None)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, ids: m.generate(ids, num_beams=4), "no beam search: decode greedily"),
        (lambda m, ids: m.generate(ids, max_length=9), "give max_new_tokens"),
        (lambda m, ids: m.generate(ids, generation_config=object()), "give its fields"),
        (lambda m, ids: m.generate(ids, max_new_token=9), 'Did you mean "max_new_tokens"'),
        (lambda m, ids: m(ids, labels=ids), "a loss is a trainer's"),
        (lambda m, ids: m(ids, foo=1), "has no argument 'foo'"),
        (lambda m, ids: m.save_pretrained("x", safe_serialization=False), "nothing but safetens"),
        (lambda m, ids: m.num_parameters(only_trainable=True), "get_nb_trainable_parameters"),
    ],
)
def test_arguments_of_calls_that_are_none_say_what_to_write(
    model: Any, call: Any, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        call(model, np.ones((1, 3), np.int32))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_head_of_another_size_is_drawn_anew_where_that_is_wanted(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIG if kind == "llama" else BERT
    load = AutoModelForSequenceClassification.from_pretrained
    AutoModelForSequenceClassification.from_config(config, num_labels=3).save_pretrained(tmp_path)
    three = load(tmp_path, ignore_mismatched_sizes=True)
    assert not caplog.text  # of the same size it is read
    with pytest.raises(MissingWeightError, match="drawn anew with ignore_mismatched_sizes=True"):
        load(tmp_path, num_labels=1)
    one = load(tmp_path, num_labels=1, ignore_mismatched_sizes=True)
    assert "Not read from the checkpoint, drawn at random: score. Train before" in caplog.text
    assert one(np.ones((1, 3), np.int32)).logits.shape == (1, 1)
    assert jax.tree.structure(one.params) == jax.tree.structure(three.params)
    rest, read = ({k: v for k, v in m.params.items() if k != "score"} for m in (one, three))
    jax.tree.map(np.testing.assert_array_equal, rest, read)
    one.save_pretrained(tmp_path / "one")
    np.testing.assert_array_equal(
        load(tmp_path / "one").params["score"]["kernel"], one.params["score"]["kernel"]
    )
    with pytest.raises(ConfigError, match="ignore_mismatched_sizes must be True or False, got 'n"):
        load(tmp_path, ignore_mismatched_sizes="no")
    # Nothing else may differ.
    file = tmp_path / "config.json"
    wide = {"vocab_size": 99} | json.loads(file.read_text()) | {"intermediate_size": 7}
    file.write_text(json.dumps(wide))
    with pytest.raises(MissingWeightError, match=r"shape of \S+\.0\.") as caught:
        load(tmp_path, num_labels=1, ignore_mismatched_sizes=True)
    assert "score" not in str(caught.value).removeprefix(str(tmp_path))
    with pytest.raises(ConfigError, match="only a classifier's head is drawn anew"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_every_tensor_of_an_adapter_of_another_base_is_listed(model: Any, tmp_path: Path) -> None:
    chosen = LoraConfig(r=2, target_modules="all-linear")
    get_peft_model(model, chosen).save_pretrained(tmp_path)
    deep = AutoModelForCausalLM.from_config(CONFIG | {"num_hidden_layers": 5})
    get_peft_model(deep, chosen).save_pretrained(tmp_path / "deep")
    with pytest.raises(MissingWeightError, match="differences") as caught:
        PeftModel.from_pretrained(model, tmp_path / "deep")
    names = [set(load_file(p / "adapter_model.safetensors")) for p in (tmp_path, tmp_path / "deep")]
    assert len(names[1] - names[0]) > 24
    assert all(f"unexpected: {name}\n" in f"{caught.value}\n" for name in names[1] - names[0])


def test_names_of_labels_stay(tmp_path: Path) -> None:
    names = {"0": "bad", "1": "ok", "2": "good"}
    config = CONFIG | {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"id2label": names}))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert list(model.config.id2label.values()) == ["bad", "ok", "good"]
