"""What trainers do with adapters: check the config, add them, and find the reference."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

from jrlhf.config import TrainingConfig, to_dict
from jrlhf.errors import ConfigError, ModelError
from jrlhf.model import Model
from jrlhf.models.build import Net
from jrlhf.models.build_encoder import AnyNet
from jrlhf.models.encoder_spec import EncoderSpec
from jrlhf.models.lora.config import LoraConfig, as_config, base_of
from jrlhf.models.lora.tree import KEY
from jrlhf.models.quantize import holds_quantized
from jrlhf.peft import PeftModel, get_peft_model


def check(face: str, args: TrainingConfig, model: Any, peft_config: Any, spec: Any) -> LoraConfig:
    """The adapter's config, checked against the model's config.json before a weight is loaded.

    Raises:
        ConfigError: something that the model does not have, or that cannot go with it.
    """
    chosen = as_config(peft_config)
    if isinstance(spec, EncoderSpec):
        raise ConfigError(
            f"{face}: a {spec.model_type} is an encoder: peft_config is for decoders."
        )
    if isinstance(model, PeftModel) or (not isinstance(model, Model) and base_of(Path(model))):
        raise ConfigError(
            f"{face}: the model has an adapter already. Train it without peft_config, or merge it "
            "first (merge_and_unload)."
        )
    if args.num_layers_unfrozen >= 0:
        raise ConfigError(
            f"{face}: num_layers_unfrozen={args.num_layers_unfrozen} means nothing beside "
            "peft_config, which freezes the whole base; layers_to_transform chooses layers."
        )
    task = "SEQ_CLS" if spec.head == "classifier" else "CAUSAL_LM"
    if chosen.task_type not in (None, task):
        raise ConfigError(f"{face}: task_type must be {task!r}, got {chosen.task_type!r}.")
    chosen = chosen.replace(task_type=task)
    Net(spec).adapter(chosen)
    return chosen


def adapted(model: Model, peft_config: LoraConfig | None, face: str, *, seed: int) -> Model:
    """The model with the adapter that a trainer was asked to train, if it was.

    Raises:
        ModelError: a model with adapters of which none is to be trained.
    """
    if peft_config is not None:
        new = get_peft_model(model, peft_config, seed=seed)
        # Before the first update B A = 0: the policy is its base, and needs no copy beside it.
        new.base_is_reference = peft_config.init_lora_weights is not False
        return new
    if not model.net.adapters and holds_quantized(model.params):
        raise ModelError(f"{face}: a quantised base cannot be trained itself: give a peft_config.")
    if isinstance(model, PeftModel) and not (model.active_adapters and model.is_trainable):
        raise ModelError(
            f"{face}: the model has no active adapter to train, or its adapter was loaded as it "
            "is: PeftModel.from_pretrained(base, path, is_trainable=True)."
        )
    return model


def base_is_reference(model: Model) -> bool:
    """Whether the reference is the model with its adapters off, and needs no copy."""
    return isinstance(model, PeftModel) and model.base_is_reference


def reference_net(model: Model, reference: Any) -> AnyNet:
    """The net of the parameters combine(reference, the policy's frozen half)."""
    if reference is None or not model.net.adapters or KEY in reference:
        return model.net
    return Net(model.decoder.spec.replace(value_head=False))


def about(model: Model) -> dict[str, Any]:
    """What else decides a training run of this model, for the config in its checkpoints."""
    if not isinstance(model, PeftModel):
        return {}
    return {"peft_config": {n: to_dict(model.peft_config[n]) for n in model.active_adapters}}


def dropout_seed(model: Model, seed: int, *, wanted: bool) -> int | None:
    """The seed of a training step's dropout; None where nothing is dropped."""
    if model.net.drops and not wanted:
        say_once(
            "lora_dropout changes nothing here: this trainer turns dropout off, as TRL's does, so "
            "that policy and reference are compared on the same footing (disable_dropout)."
        )
    return seed if model.net.drops and wanted else None


@functools.lru_cache
def say_once(text: str) -> None:
    """A warning that is printed once per process."""
    warnings.warn(text, UserWarning, stacklevel=3)
