"""TRL's flags for adapters: each acts, alone it is an error, and a run writes an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jrlhf.auto import AutoModelForCausalLM
from jrlhf.commands import sft, training
from jrlhf.commands.adapters import peft_config
from jrlhf.errors import ConfigError, UnsupportedFieldError
from jrlhf.peft import LoraConfig, PeftModel
from jrlhf.trainers.sft import SFTConfig
from tests.rollout.conftest import word_tokenizer

# TRL 1.16's defaults of these flags.
PLAIN = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05)


def chosen(*words: str) -> Any:
    needed = ["--dataset_name", "rows.jsonl"]
    return training.arguments([*needed, *words], SFTConfig, verb="sft")


FLAGS: dict[str, tuple[list[str], LoraConfig]] = {
    "use_peft": ([], PLAIN),
    "lora_r": (["--lora_r", "4"], PLAIN.replace(r=4)),
    "lora_alpha": (["--lora_alpha", "8"], PLAIN.replace(lora_alpha=8)),
    "lora_dropout": (["--lora_dropout", "0"], PLAIN.replace(lora_dropout=0.0)),
    "all-linear": (
        ["--lora_target_modules", "all-linear"], PLAIN.replace(target_modules="all-linear"),
    ),
    "one name": (["--lora_target_modules", "q_proj"], PLAIN.replace(target_modules=["q_proj"])),
    "names": (
        ["--lora_target_modules", "q_proj", "v_proj"],
        PLAIN.replace(target_modules=["q_proj", "v_proj"]),
    ),
    "an expression": (
        ["--lora_target_modules", r".*\.(q|v)_proj"],
        PLAIN.replace(target_modules=r".*\.(q|v)_proj"),
    ),
    "lora_modules_to_save": (
        ["--lora_modules_to_save", "lm_head"],
        PLAIN.replace(modules_to_save=["lm_head"], ensure_weight_tying=True),
    ),
    "lora_task_type": (["--lora_task_type", "SEQ_CLS"], PLAIN.replace(task_type="SEQ_CLS")),
    "use_rslora": (["--use_rslora"], PLAIN.replace(use_rslora=True)),
    "use_dora": (["--use_dora"], PLAIN.replace(use_dora=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_acts_and_needs_use_peft(name: str) -> None:
    words, expected = FLAGS[name]
    script, _ = chosen("--use_peft", *words)
    assert peft_config(script) == expected
    if words:
        with pytest.raises(ConfigError, match=f"{words[0][2:]} acts on an adapter: add use_peft"):
            chosen(*words)
    else:
        assert peft_config(chosen()[0]) is None


def test_the_base_is_quantised_by_trls_flags() -> None:
    for bits in (4, 8):
        _, config = chosen("--use_peft", f"--load_in_{bits}bit")
        assert config.model_init_kwargs == {f"load_in_{bits}bit": True}
    with pytest.raises(ConfigError, match="load_in_4bit acts on an adapter"):
        chosen("--load_in_4bit")
    with pytest.raises(UnsupportedFieldError, match="nf4"):
        chosen("--use_peft", "--bnb_4bit_quant_type", "fp4")


def test_a_run_writes_an_adapter_that_from_pretrained_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = word_tokenizer([f"w{i}" for i in range(20)])
    config = {
        "model_type": "llama", "vocab_size": 24, "hidden_size": 8, "intermediate_size": 12,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(config, tokenizer=tokenizer).save_pretrained("base")
    rows = [json.dumps({"text": f"w{i} w{i + 1} w3"}) for i in range(8)]
    Path("rows.jsonl").write_text("\n".join(rows))
    words = ("--model base --dataset rows.jsonl --output_dir out --max_steps 1 --use_peft "
             "--lora_r 2 --per_device_train_batch_size 1 --save_strategy no")  # fmt: skip
    assert sft.main(words.split()) == 0
    assert json.loads(Path("out/model/adapter_config.json").read_text())["r"] == 2
    again = AutoModelForCausalLM.from_pretrained("out/model")
    assert isinstance(again, PeftModel)
    assert again.active_adapters == ["default"]
    assert again.is_trainable
