"""Flags of the training verbs for adapters and quantised bases, by TRL's names (ModelConfig)."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from jrlhf.config import config
from jrlhf.errors import ConfigError


@config
class AdapterArguments:
    """What to adapt; see `jrlhf.peft.LoraConfig`.

    Attributes:
        use_peft: train a new adapter on a frozen base. The fields below need it.
        lora_r: rank.
        lora_alpha: the low-rank product is multiplied by lora_alpha / r.
        lora_dropout: rate on the inputs of the low-rank path in training.
        lora_target_modules: names of linear maps, one regular expression, or all-linear; None: the
            family's default.
        lora_modules_to_save: modules that are trained whole, and saved with the adapter.
        lora_task_type: CAUSAL_LM or SEQ_CLS; None: the verb's.
        use_rslora: multiply by lora_alpha / sqrt(r) instead.
        use_dora: learn magnitudes apart from directions.
        load_in_8bit: keep the frozen base as int8.
        load_in_4bit: keep it as nf4 (QLoRA).
    """

    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_target_modules: list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    lora_task_type: str | None = None
    use_rslora: bool = False
    use_dora: bool = False
    load_in_8bit: bool = False
    load_in_4bit: bool = False

    REFUSED = {
        "lora_target_parameters": "only linear maps can be adapted; see lora_target_modules",
        "bnb_4bit_quant_type": "load_in_4bit is nf4",
        "use_bnb_nested_quant": "scales are not quantised again",
        "bnb_4bit_quant_storage": "codes are kept as four-bit integers",
    }

    def __post_init__(self) -> None:
        fields = dataclasses.fields(AdapterArguments)  # type: ignore[arg-type]
        given = [f.name for f in fields if getattr(self, f.name) != f.default]
        if given and not self.use_peft:
            raise ConfigError(f"{given[0]} acts on an adapter: add use_peft.")


def loading(script: AdapterArguments) -> dict[str, bool]:
    """The arguments of from_pretrained that the flags ask for."""
    asked = {"load_in_8bit": script.load_in_8bit, "load_in_4bit": script.load_in_4bit}
    return {name: value for name, value in asked.items() if value}


def peft_config(script: AdapterArguments) -> Any:
    """The flags as a LoraConfig; None without use_peft."""
    if not script.use_peft:
        return None
    from jrlhf.peft import LoraConfig

    targets: Any = script.lora_target_modules
    if targets is not None and len(targets) == 1 and _is_pattern(targets[0]):
        targets = targets[0]
    fields: dict[str, Any] = {
        "r": script.lora_r,
        "lora_alpha": script.lora_alpha,
        "lora_dropout": script.lora_dropout,
        "target_modules": targets,
        "modules_to_save": script.lora_modules_to_save,
        # No flag of TRL says it, and a tied embedding cannot be saved otherwise.
        "ensure_weight_tying": script.lora_modules_to_save is not None,
        "task_type": script.lora_task_type,
        "use_rslora": script.use_rslora,
        "use_dora": script.use_dora,
    }
    return LoraConfig(**fields)


def _is_pattern(name: str) -> bool:
    """Whether one word means more than a module's name: PEFT takes text as an expression."""
    return name.lower() == "all-linear" or re.fullmatch(r"[\w.]+", name) is None
