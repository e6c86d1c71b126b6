"""Adapters of resized bases: PEFT writes the embedding tables beside them, and so does jrlhf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jrlhf import AutoModelForCausalLM
from jrlhf.errors import MissingWeightError
from jrlhf.peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tests.models.conftest import CONFIG, tensors_of, write_hf

V = CONFIG["vocab_size"]
IDS = np.array([[1, 5, V + 1, V + 3], [V, 2, 9, V + 2]])
FILE = "adapter_model.safetensors"
EMBED, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


PADDED = {"pad_vocab_to_multiple_of": 32}


@pytest.fixture(scope="module", params=[False, True], ids=["two tables", "tied"])
def origin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**CONFIG, "tie_word_embeddings": request.param}
    return write_hf(tmp_path_factory.mktemp("base"), config, tensors_of(config))


def resized(origin: Path, **options: Any) -> Any:
    base = AutoModelForCausalLM.from_pretrained(origin, **options)
    base.resize_token_embeddings(V + 4, mean_resizing=False, seed=3)
    return base


def adapted(base: Any, **fields: Any) -> PeftModel:
    chosen = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **fields)
    return get_peft_model(base, chosen)


def logits(model: Any) -> np.ndarray:
    return np.asarray(model(IDS).logits)[..., : V + 4]


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("options", [{}, {"mesh": "fsdp=4,tensor=2", **PADDED}, PADDED])
def test_a_resized_bases_tables_come_back_with_the_adapter(
    origin: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = adapted(resized(origin))
    model.save_pretrained(tmp_path)
    assert {EMBED, HEAD} <= load_file(tmp_path / FILE).keys()
    for kind in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        again = kind.from_pretrained(tmp_path, **options)
        assert again.net.spec.vocab_size == V + 4
        close(logits(again), logits(model))
    assert again.net.spec.vocab_rows == (64 if "pad_vocab_to_multiple_of" in options else V + 4)
    # Saved again, loaded over a base with other rows, saved again.
    again.save_pretrained(tmp_path / "again")
    base = AutoModelForCausalLM.from_pretrained(origin)
    base.resize_token_embeddings(V + 4, mean_resizing=False, seed=4)
    before = np.asarray(base.params["embed"]["table"])
    over = PeftModel.from_pretrained(base, tmp_path / "again")
    close(logits(over), logits(model))
    np.testing.assert_array_equal(base.params["embed"]["table"], before)
    first = load_file(tmp_path / FILE)
    found = load_file(tmp_path / "again" / FILE)
    assert found.keys() == first.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_base_that_was_not_resized_says_how(origin: Path, tmp_path: Path) -> None:
    adapted(resized(origin)).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(origin)
    with pytest.raises(MissingWeightError, match=rf"resize_token_embeddings\({V + 4}\) first"):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_head_of_another_size_is_no_question_of_tokens(origin: Path, tmp_path: Path) -> None:
    adapted(AutoModelForCausalLM.from_pretrained(origin)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    save_file({**tensors, HEAD: np.zeros((V, 3), np.float32)}, tmp_path / FILE)
    with pytest.raises(MissingWeightError, match=rf"shape of {HEAD} is") as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "resize" not in str(error.value)


def test_training_leaves_the_tables_alone(origin: Path) -> None:
    from jrlhf.models.build import partition

    model = adapted(resized(origin))
    trainable = partition(model.params, model.net)[0]
    assert set(trainable) == {"adapters"}


SAVED: list[dict[str, Any]] = [
    {},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
]


@pytest.mark.parity
@pytest.mark.parametrize("fields", SAVED)
@pytest.mark.parametrize("tokens", [V, V + 4])
def test_what_peft_saved_of_a_resized_base_loads(
    origin: Path, tmp_path: Path, fields: dict[str, Any], tokens: int
) -> None:
    import peft
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(origin)
    tied = theirs.config.tie_word_embeddings
    more = {**fields, "ensure_weight_tying": True} if tied and fields else fields
    if tokens != V:
        torch.manual_seed(5)
        theirs.resize_token_embeddings(tokens)
    chosen = peft.LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM",
        **json.loads(json.dumps(more)),
    )  # fmt: skip
    model = peft.get_peft_model(theirs, chosen).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "embed_tokens" in name or "lm_head" in name:
                parameter.mul_(1.5)  # whoever trained it
    model.save_pretrained(tmp_path, save_embedding_layers=True if tokens == V else "auto")
    ids = IDS % tokens
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    base = AutoModelForCausalLM.from_pretrained(origin)
    base.resize_token_embeddings(tokens)
    for ours in (PeftModel.from_pretrained(base, tmp_path),
                 AutoModelForCausalLM.from_pretrained(tmp_path)):  # fmt: skip
        close(np.asarray(ours(ids).logits), expected)
        # What came beside an adapter goes on beside it, of a base of any size.
        ours.respec(remat="full").save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        close(np.asarray(again(ids).logits), expected)


@pytest.mark.parity
@pytest.mark.parametrize("fields", SAVED)
def test_what_is_saved_of_a_resized_base_loads_in_peft(
    origin: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    import peft
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(origin)
    more = {"ensure_weight_tying": True} if theirs.config.tie_word_embeddings and fields else {}
    model = adapted(resized(origin), task_type="CAUSAL_LM", **fields, **more)
    model.save_pretrained(tmp_path)
    theirs.resize_token_embeddings(V + 4)
    again = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    with torch.no_grad():
        close(again(torch.tensor(IDS)).logits.numpy(), logits(model))
