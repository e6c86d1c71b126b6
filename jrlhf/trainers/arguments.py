"""Old and foreign arguments of the trainers' constructors."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from jrlhf.config import aliases
from jrlhf.errors import ConfigError, suggest

# Arguments of TRL's trainers that belong to PyTorch.
_REFUSED = {
    "optimizers": "choose it with the config's optim, learning_rate and lr_scheduler_type",
    "optimizer_cls_and_kwargs": "choose the optimizer with the config's optim",
    "quantization_config": "give model_init_kwargs={'load_in_4bit': True}",
    "data_collator": "rows are padded to one static length; shape them in the dataset",
    "compute_loss_func": "the loss is the algorithm's; see jrlhf.algos",
    "compute_metrics": "metrics are the algorithm's; use callbacks to add your own",
    "preprocess_logits_for_metrics": "logits are never built",
    "model_init": "pass the model",
    "eval_dataset": "the rollouts are the evaluation; compare policies with `jrlhf evaluate`",
}
_OLD = {"tokenizer": "processing_class", "config": "args", "dataset": "train_dataset",
        "policy": "model", "ref_policy": "ref_model"}  # fmt: skip


def modernise(
    face: str, config_class: type, given: dict[str, Any], old: dict[str, Any]
) -> dict[str, Any]:
    """Merges a constructor's old keyword arguments into its present ones.

    Args:
        face: name of the trainer, for messages.
        config_class: its config; fields given to the trainer go there.
        given: the present arguments, with "args".
        old: everything else that was given.

    Returns:
        `given` with renamed arguments filled in and "args" a config.

    Raises:
        ConfigError: an unknown or doubled argument, or one that cannot work here.
    """
    fields = {f.name for f in dataclasses.fields(config_class)} | set(aliases(config_class))
    into_config: dict[str, Any] = {}
    for name, value in old.items():
        new = _OLD.get(name, name)
        if new in given and new != name:
            _warn(f"{face}: {name} is now {new}.")
            if given[new] is not None:
                raise ConfigError(f"{face}: {name} and {new} mean the same; give one of them.")
            given[new] = value
        elif name in fields:
            _warn(f"{face}: {name} belongs into {config_class.__name__}({name}=...).")
            into_config[name] = value
        elif name in _REFUSED:
            if value not in (None, (None, None)):
                raise ConfigError(f"{face}: {name} is not supported: {_REFUSED[name]}.")
        else:
            raise ConfigError(f"{face} has no argument {name!r}.{suggest(name, [*given, *fields])}")
    args = given["args"]
    if args is not None and not isinstance(args, config_class):
        raise ConfigError(
            f"{face}: args must be a {config_class.__name__}, got {type(args).__name__}."
        )
    if args is None:
        args = config_class(**into_config)
    elif into_config:
        args = dataclasses.replace(args, **into_config)  # type: ignore[type-var]
    given["args"] = args
    return given


def _warn(text: str) -> None:
    warnings.warn(text, DeprecationWarning, stacklevel=5)
