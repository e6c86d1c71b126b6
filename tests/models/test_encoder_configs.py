"""Configs of encoders: there and back, in other words, and what is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrlhf.auto import AutoModelForSequenceClassification
from jrlhf.errors import UnsupportedModelError
from jrlhf.models.build_encoder import EncoderNet, net_of
from jrlhf.models.encoder_spec import EncoderSpec
from jrlhf.models.families import config_from_spec, spec_from_config
from jrlhf.models.hf.reader import SafetensorsCheckpoint
from tests.models.conftest import tensors_of, write_hf
from tests.models.test_encoders import BERT, DEBERTA, MODERNBERT

DISTILBERT = {"model_type": "distilbert"}
# Without relative attention nothing is read of its positions, and the norm's weights are there.
ALONE = DEBERTA | {"relative_attention": False, "conv_kernel_size": 0}


def test_a_norm_of_positions_is_kept_where_relative_attention_is_off(tmp_path: Path) -> None:
    config = ALONE | {"norm_rel_ebd": "none | layer_norm"}
    norm = {
        f"deberta.encoder.LayerNorm.{name}": np.arange(16, dtype=np.float32)
        for name in ("weight", "bias")
    }
    bare = tensors_of(config | {"norm_rel_ebd": "none"})
    path = write_hf(tmp_path / "theirs", config, bare | norm)
    model = AutoModelForSequenceClassification.from_pretrained(path)
    model.save_pretrained(tmp_path / "ours")
    saved = SafetensorsCheckpoint(tmp_path / "ours")
    assert saved.shapes.keys() == bare.keys() | norm.keys()
    for name, tensor in norm.items():
        np.testing.assert_array_equal(saved.read(name, (slice(0, 16),)), tensor)
    ids = np.arange(3, 20)[None]
    plain = write_hf(tmp_path / "plain", config | {"norm_rel_ebd": "none"}, bare)
    without = AutoModelForSequenceClassification.from_pretrained(plain)
    np.testing.assert_array_equal(model(ids).logits, without(ids).logits)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_rel_ebd", "layer_norm"),
        ("norm_rel_ebd", "none"),
        ("position_buckets", 200),
        ("position_buckets", 1),
        ("max_relative_positions", 1),
        ("pos_att_type", ["p2c"]),
        ("pos_att_type", ["c2p", "p2p"]),
        ("share_att_key", False),
    ],
)
def test_keys_of_relative_attention_come_back_where_it_is_off(key: str, value: Any) -> None:
    spec = spec_from_config(ALONE | {key: value})
    assert isinstance(spec, EncoderSpec)
    written = config_from_spec(spec)
    assert written[key] == value
    assert not written["relative_attention"]
    assert spec_from_config(written) == spec


def test_the_scores_divisor_counts_the_terms_that_there_are() -> None:
    for terms, count in (("c2p|p2p", 2), ("p2c|c2p|c2p", 3), ("", 1)):
        assert spec_from_config(ALONE | {"pos_att_type": terms}).score_terms == count  # type: ignore[union-attr]


def test_the_groups_of_a_convolution_that_is_not_there_are_not_judged() -> None:
    assert spec_from_config(ALONE | {"conv_groups": 2}) == spec_from_config(ALONE)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BERT | {"is_decoder": True}, "is_decoder=True is not implemented, only False or None"),
        (
            BERT | {"add_cross_attention": True},
            "add_cross_attention=True is not implemented, only False or None",
        ),
        (
            BERT | {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key' is not implemented, only 'absolute' or None",
        ),
        (
            DEBERTA | {"conv_groups": 2},
            "conv_groups=2 is not implemented, only 1 or None",
        ),
        (
            DEBERTA | {"pooler_hidden_size": 8},
            "pooler_hidden_size=8 is not implemented, only 16 or None",
        ),
        (
            DEBERTA | {"attention_head_size": 6},
            "attention_head_size=6 is not implemented, only 4 or None",
        ),
        *(
            (config | {"quantization_config": {"bits": 4}},
             "quantization_config={'bits': 4} is not implemented, only None: load the weights")
            for config in (BERT, DISTILBERT, MODERNBERT, DEBERTA)
        ),
        (DEBERTA | {"conv_kernel_size": 4}, "conv_kernel_size=4 must be odd"),
        (
            MODERNBERT | {"layer_types": ["chunked"] * 4},
            "layer_types has ['chunked']; known: ['full_attention', 'sliding_attention']",
        ),
    ],
    ids=lambda x: x.split("=")[0] if isinstance(x, str) else "",
)  # fmt: skip
def test_what_is_refused_says_what_is_not(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(said)):
        spec_from_config(config)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (BERT | {"hidden_act": "mish"}, "hidden_act='mish'"),
        (BERT | {"num_attention_heads": 3}, "num_attention_heads=3"),
        (DEBERTA | {"pos_att_type": "c2p|p2p"}, "pos_att_type='p2p'"),
        (DEBERTA | {"position_buckets": 200}, "position_buckets=200"),
        (MODERNBERT | {"layer_types": ["full_attention"]}, "layer_types names 1"),
        (MODERNBERT | {"classifier_pooling": "max"}, "classifier_pooling='max'"),
        (
            MODERNBERT | {"rope_parameters": {"full_attention": {"rope_type": "spiral"}}},
            "rope_type='spiral'",
        ),
        (MODERNBERT | {"rope_parameters": {"rope_type": "linear"}}, "has rope_type: give a dict"),
        (
            MODERNBERT | {"rope_scaling": {"sliding_attention": {"rope_type": "linear"}}},
            "'linear' needs factor",
        ),
        (BERT | {"model_type": "bart"}, "model_type='bart'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_flags_that_are_not_implemented_are_named(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        spec_from_config(config)


@pytest.mark.parametrize("config", [BERT, DEBERTA, MODERNBERT], ids=lambda c: c["model_type"])
def test_a_written_config_is_read_alike(config: dict[str, Any]) -> None:
    spec = spec_from_config(config)
    assert isinstance(spec, EncoderSpec)
    assert spec_from_config(config_from_spec(spec)) == spec
    assert isinstance(net_of(spec), EncoderNet)


def test_modernbert_of_transformers_4_means_the_same() -> None:
    old = MODERNBERT | {
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 900.0,
        "local_rope_theta": None,
    }
    spec = spec_from_config(old)
    assert spec.local == (False, True, False, True)  # type: ignore[union-attr]
    assert spec.rope.rope_theta == 900.0  # type: ignore[union-attr]
    assert spec.local_rope.rope_theta == 900.0  # type: ignore[union-attr]
