"""Every field of `LoraConfig` acts, as PEFT's, or is a named error."""

from __future__ import annotations

from typing import Any

import pytest

from jrlhf.errors import ConfigError, UnsupportedFieldError
from jrlhf.models.build import Net
from jrlhf.models.lora.config import LoraConfig, as_config
from jrlhf.models.lora.plan import Adapter
from jrlhf.models.spec import DecoderSpec

SPEC = DecoderSpec(
    vocab_size=23,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)
NET = Net(SPEC)


def planned(**changes: Any) -> Adapter:
    return NET.adapter(LoraConfig(**{"target_modules": ["q_proj"], **changes}))


def of(adapter: Adapter) -> dict[str, tuple[tuple[int, ...], tuple[float, ...]]]:
    return {t.names[0].rsplit(".", 1)[-1]: (t.ranks, t.scales) for t in adapter.targets}


THREE = (8, 8, 8)
FIELDS: dict[str, tuple[dict[str, Any], Any]] = {
    "r": ({"r": 2}, {"q_proj": ((2, 2, 2), (4.0,) * 3)}),
    "lora_alpha": ({"lora_alpha": 4}, {"q_proj": (THREE, (0.5,) * 3)}),
    "use_rslora": ({"use_rslora": True}, {"q_proj": (THREE, (8 / 8**0.5,) * 3)}),
    "target_modules": ({"target_modules": ".*1.*k_proj"}, {"k_proj": ((0, 8, 0), (0.0, 1.0, 0.0))}),
    "exclude_modules": (
        {"exclude_modules": ["0.self_attn.q_proj"]},
        {"q_proj": ((0, 8, 8), (0.0, 1.0, 1.0))},
    ),
    "layers_to_transform": (
        {"layers_to_transform": 1}, {"q_proj": ((0, 8, 0), (0.0, 1.0, 0.0))},
    ),
    "layers_pattern": (
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"q_proj": ((0, 8, 0), (0.0, 1.0, 0.0))},
    ),
    "rank_pattern": (
        {"rank_pattern": {"layers.0.*": 4}}, {"q_proj": ((4, 8, 8), (2.0, 1.0, 1.0))},
    ),
    "alpha_pattern": (
        {"alpha_pattern": {"q_proj": 16}}, {"q_proj": (THREE, (2.0,) * 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_decides_what_is_adapted(field: str) -> None:
    changes, expected = FIELDS[field]
    assert of(planned(**changes)) == expected
    assert of(planned()) == {"q_proj": (THREE, (1.0,) * 3)}


def test_the_other_fields_act_too() -> None:
    assert planned(lora_dropout=0.25).dropout == 0.25
    assert planned(use_dora=True).dora
    assert planned(modules_to_save=["lm_head"]).saved == (("head", "kernel"),)
    assert of(planned(target_modules=None)).keys() == {"q_proj", "v_proj"}
    assert len(planned(target_modules="all-linear").targets) == 7
    classifier = Net(SPEC.replace(head="classifier"))
    assert classifier.adapter(LoraConfig(task_type="SEQ_CLS")).saved == (("score", "kernel"),)
    assert classifier.adapter(LoraConfig()).saved == ()
    tied = Net(SPEC.replace(tie_word_embeddings=True))
    whole = LoraConfig(modules_to_save=["embed_tokens"])
    with pytest.raises(ConfigError, match="ensure_weight_tying=True"):
        tied.adapter(whole)
    both = tied.adapter(whole.replace(ensure_weight_tying=True))
    assert both.saved == (("embed", "table"),)
    head = LoraConfig(modules_to_save=["lm_head"], ensure_weight_tying=True)
    assert tied.adapter(head).saved == both.saved
    assert as_config({"target_modules": {"b", "a"}}).target_modules == ["a", "b"]
    assert LoraConfig(layers_to_transform={10, 9}).layers_to_transform == [9, 10]


@pytest.mark.parametrize(
    ("error", "match", "fields"),
    [
        (ConfigError, "r must be at least 1, got 0", {"r": 0}),
        (ConfigError, r"rank_pattern\['q'\] must be at least 1", {"rank_pattern": {"q": 0}}),
        (ConfigError, "lora_alpha must be positive", {"lora_alpha": 0}),
        (ConfigError, "lora_dropout must lie in", {"lora_dropout": 1.0}),
        (ConfigError, 'Did you mean "gaussian"', {"init_lora_weights": "gausian"}),
        (UnsupportedFieldError, "'pissa' is not supported: it changes the base;",
         {"init_lora_weights": "pissa"}),
        (UnsupportedFieldError, "'eva' is not supported: it needs data;",
         {"init_lora_weights": "eva"}),
        (UnsupportedFieldError, "'mica' is not supported: it never trains B;",
         {"init_lora_weights": "mica"}),
        (ConfigError, 'Did you mean "orthogonal"', {"init_lora_weights": "ortogonal"}),
        (ConfigError, r"modules_to_save\[0\] must be str, got 1", {"modules_to_save": (1,)}),
        (ConfigError, "task_type must be one of", {"task_type": "SEQ_2_SEQ_LM"}),
        (ConfigError, "needs target_modules as a list",
         {"layers_to_transform": 1, "target_modules": "all-linear"}),
        (ConfigError, "only with layers_to_transform", {"layers_pattern": "layers"}),
        (ConfigError, "bias must be one of", {"bias": "all"}),
        (ConfigError, 'Did you mean "use_dora"', {"use_dra": True}),
        (UnsupportedFieldError, "lora_bias is not supported", {"lora_bias": True}),
        (UnsupportedFieldError, "trainable_token_indices", {"trainable_token_indices": [1]}),
        (ConfigError, r"target_modules: '\(\(' is no regular", {"target_modules": "(("}),
        (ConfigError, r"exclude_modules: '\(\(' is no regular", {"exclude_modules": "(("}),
        (ConfigError, r"rank_pattern: '\(\(' is no regular", {"rank_pattern": {"((": 4}}),
        (ConfigError, "alpha_pattern.*must be positive", {"alpha_pattern": {"q_proj": "4"}}),
        (ConfigError, r"target_modules\[0\] must be str, got 1", {"target_modules": [1]}),
    ],
)  # fmt: skip
def test_what_a_config_cannot_say_is_named(
    error: type[Exception], match: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(error, match=match):
        LoraConfig(**fields)


@pytest.mark.parametrize(
    ("match", "fields"),
    [
        ('names no linear map of this llama.*Did you mean "q_proj"', {"target_modules": ["q_prj"]}),
        ("'embed_tokens' is no linear map.*modules_to_save",
         {"target_modules": ["q_proj", "embed_tokens"]}),
        ("the model has no 'lm_hed'", {"modules_to_save": ["lm_hed"]}),
        ("of some layers only", {"modules_to_save": ["layers.1.input_layernorm"]}),
        (r"layers_to_transform=\[9\] names a layer .* not have; it has 3 layers, 0 to 2",
         {"layers_to_transform": [9]}),
        (r"layers_to_transform=\[0, 3\] names a layer", {"layers_to_transform": [0, 3]}),
        ("layers_to_transform=-1 names a layer", {"layers_to_transform": -1}),
        (r"layers_pattern='h' is not what stands.*called like model\.layers\.0\.",
         {"layers_to_transform": [1], "layers_pattern": "h"}),
        ("nothing of it is left to adapt by exclude_modules", {"exclude_modules": ["q_proj"]}),
        ("left to adapt by layers_to_transform",
         {"target_modules": ["0.self_attn.q_proj"], "layers_to_transform": [1]}),
        (r"'orthogonal' needs even ranks; model\.layers\.1\.\S+ has 3",
         {"init_lora_weights": "orthogonal", "rank_pattern": {"layers.1.*": 3}}),
    ],
)  # fmt: skip
def test_what_a_model_does_not_have_is_named(match: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=match):
        planned(**fields)
