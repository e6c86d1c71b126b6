"""Configs that make no sense are named errors, whatever is wrong with them."""

from __future__ import annotations

import numpy as np
import pytest

from jrlhf import AutoModelForCausalLM
from jrlhf.errors import ConfigError, ModelError
from jrlhf.models.families import FAMILIES, config_from_spec, spec_from_config
from jrlhf.models.hf.reader import read_json
from jrlhf.models.load import load_pretrained
from tests.models.conftest import CONFIG
from tests.models.test_pieces import ENCODERS

NONSENSE = [
    "many",
    -3,
    0,
    [],
    [None],
    {},
    {"rope_type": "spiral"},
    float("nan"),
    True,
    "1",
    10**400,
]
NAMED = {
    "a text for a size": ({"hidden_size": "wide"}, r"hidden_size='wide'"),
    "a list for a size": ({"num_hidden_layers": [2]}, r"num_hidden_layers=\[2\]"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads=0"),
    "a negative size": ({"intermediate_size": -1}, "intermediate_size=-1 must be at least 1"),
    "an unknown rotation": (
        {"rope_parameters": {"rope_type": "spiral"}},
        "rope_type='spiral' is not implemented; known: default, linear",
    ),
    "a rotation's number that is none": (
        {"rope_parameters": {"rope_type": "linear", "factor": "big"}},
        "rope_parameters=",
    ),
    "rotations as a text": ({"rope_parameters": "yarn"}, "rope_parameters='yarn'"),
    "an unknown activation": ({"hidden_act": "mish"}, "hidden_act='mish'.*known: gelu"),
    "an activation that is no text": ({"hidden_act": ["silu"]}, "hidden_act=.*silu.*known: gelu"),
    "labels that cannot be counted": ({"id2label": 3}, "id2label=3"),
    "no architecture": ({"model_type": None}, "model_type=None is not implemented; known: bert"),
    "another architecture": ({"model_type": "mamba"}, "model_type='mamba'"),
    "an architecture that is no text": ({"model_type": ["llama"]}, r"model_type=\['llama'\]"),
    "quantized weights": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
}


@pytest.mark.parametrize("case", NAMED)
def test_what_is_wrong_with_a_config_is_named(case):
    changes, message = NAMED[case]
    with pytest.raises(ModelError, match=message):
        spec_from_config(CONFIG | changes)


def test_embeddings_of_no_width_are_named():
    with pytest.raises(ModelError, match="word_embed_proj_dim=-4 must be at least 1"):
        spec_from_config({"model_type": "opt", "word_embed_proj_dim": -4})


def test_a_config_nested_without_end_is_named(tmp_path):
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ModelError, match="is not valid JSON"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("option", ["num_layers_unfrozen", "pad_vocab_to_multiple_of"])
def test_options_that_are_no_numbers_are_named(option, hf_directory):
    with pytest.raises(ConfigError, match="'x'"):
        load_pretrained(hf_directory()[0], **{option: "x"})


@pytest.mark.parametrize("ends", ["x", [1, "x"], True, 1.5])
def test_an_end_of_text_that_is_no_id_is_named(ends, hf_directory):
    model = AutoModelForCausalLM.from_pretrained(hf_directory(eos_token_id=ends)[0])
    with pytest.raises(ModelError, match="eos_token_id="):
        model.generate(np.ones((1, 3), np.int32))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_value_of_any_key_raises_anything_but_our_errors(family):
    config = config_from_spec(spec_from_config({"model_type": family, **ENCODERS}))
    rng = np.random.default_rng(0)
    refused = 0
    for key in config:
        for at in rng.choice(len(NONSENSE), 4, replace=False):
            try:
                spec_from_config(config | {key: NONSENSE[at]})
            except ModelError:
                refused += 1
    assert refused > len(config)
