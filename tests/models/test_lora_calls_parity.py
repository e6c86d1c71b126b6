"""What users of PEFT do with an adapter besides training it: Auto classes, first values, heads."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jrlhf import AutoModelForCausalLM, AutoModelForSequenceClassification
from jrlhf.errors import MissingWeightError
from jrlhf.models.families import DECODERS, spec_from_config
from jrlhf.models.lora.config import LoraConfig, written_config
from jrlhf.peft import PeftModel, get_peft_model
from tests.models.test_families import config
from tests.models.test_lora_parity import CONFIG, IDS, by_name, close

pytestmark = pytest.mark.parity
KINDS = {
    "LlamaForCausalLM": AutoModelForCausalLM,
    "LlamaForSequenceClassification": AutoModelForSequenceClassification,
}


def saved(kind: str, path: Path) -> Any:
    """A base of transformers, on disk."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {**CONFIG, "initializer_range": 0.3, "pad_token_id": 0}
    model = getattr(transformers, kind)(transformers.LlamaConfig(**sizes))
    model.save_pretrained(path)
    return getattr(transformers, kind).from_pretrained(path)


@pytest.mark.parametrize("kind", KINDS)
def test_pefts_auto_classes_find_the_base_of_an_adapter_without_a_task(
    kind: str, tmp_path: Path
) -> None:
    import peft
    import torch

    theirs = peft.get_peft_model(
        saved(kind, tmp_path / "base"), peft.LoraConfig(target_modules=["q_proj"])
    )
    theirs.save_pretrained(tmp_path / "theirs")
    base = KINDS[kind].from_pretrained(tmp_path / "base")
    fields = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    ours = get_peft_model(base, LoraConfig(**fields))
    ours.save_pretrained(tmp_path / "ours")
    written, wanted = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("ours", "theirs")
    )
    assert written["auto_mapping"] == wanted["auto_mapping"]
    assert written["task_type"] is wanted["task_type"] is None
    expected = np.asarray(ours(IDS).logits)
    # PEFT's class for classifiers wants a head in the file, which without a task none of PEFT has.
    for auto in ("AutoPeftModel", *["AutoPeftModelForCausalLM"] * kind.endswith("CausalLM")):
        back = getattr(peft, auto).from_pretrained(tmp_path / "ours").eval()
        close(expected, back(torch.tensor(IDS)).logits.detach(), auto)
    # With a task PEFT goes by that.
    get_peft_model(base, LoraConfig(**fields, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"] is None


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_transformers_has_the_class_that_an_adapters_config_names(family: str) -> None:
    spec = spec_from_config(config(family))
    values = written_config(LoraConfig(), spec=spec, base=None, target_modules=["q_proj"])
    named = values["auto_mapping"]
    assert hasattr(importlib.import_module(named["parent_library"]), named["base_model_class"])


def test_orthogonal_first_values_are_pefts(tmp_path: Path) -> None:
    import peft
    import torch

    torch.manual_seed(1)
    theirs = saved("LlamaForCausalLM", tmp_path)
    fields: dict[str, Any] = {
        "r": 8,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 4},
        "init_lora_weights": "orthogonal",
    }
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = get_peft_model(base, LoraConfig(**fields), seed=3)
    ours = by_name(model, model.params["adapters"]["default"])
    wanted = peft.get_peft_model_state_dict(peft.get_peft_model(theirs, peft.LoraConfig(**fields)))
    assert ours.keys() == wanted.keys()
    spread = []
    for held in (ours, {name: tensor.numpy() for name, tensor in wanted.items()}):
        spread.append({end: np.std([x for name, v in held.items() if end in name for x in v.flat])
                       for end in ("lora_A", "lora_B")})  # fmt: skip
        for name in held:
            if "lora_A" in name:
                a, b = held[name], held[name.replace("lora_A", "lora_B")]
                assert np.abs(b @ a).max() < 1e-6 < 0.01 < min(np.abs(a).max(), np.abs(b).max())
                # Half of an orthogonal matrix's rows is in A, the other half in B.
                assert [np.linalg.matrix_rank(x, tol=1e-4) for x in (a, b)] == [len(a) // 2] * 2
    # A sum of r / 2 products whose squares sum to 1/2, over 10; 300 numbers or more of each.
    for end in ("lora_A", "lora_B"):
        assert spread[0][end] == pytest.approx(0.5**0.5 / 10, rel=0.15)
        assert spread[0][end] == pytest.approx(spread[1][end], rel=0.2)
    close(model(IDS).logits, base(IDS).logits, "the base's logits")
    again = get_peft_model(base, LoraConfig(**fields), seed=4).params["adapters"]
    assert not np.allclose(jax.tree.leaves(again)[0], jax.tree.leaves(model.params["adapters"])[0])
    # It goes on as any other adapter, here and there.
    model.save_pretrained(tmp_path / "adapter")
    held = PeftModel.from_pretrained(base, tmp_path / "adapter").peft_config["default"]
    assert held.init_lora_weights == "orthogonal"
    back = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    for name, tensor in peft.get_peft_model_state_dict(back).items():
        np.testing.assert_array_equal(tensor.numpy(), ours[name])


def test_a_low_rank_path_beside_a_head_is_named(tmp_path: Path) -> None:
    """Without a task PEFT's "all-linear" takes a classifier's head for one more linear map."""
    import peft

    theirs = saved("LlamaForSequenceClassification", tmp_path)
    chosen = peft.LoraConfig(r=2, target_modules="all-linear")
    peft.get_peft_model(theirs, chosen).save_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(MissingWeightError, match=r"(?s)score\.lora_A.*Low-rank paths beside emb"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
