"""What the training verbs share: arguments in, a trained and saved model out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jrlhf.commands.adapters import loading
from jrlhf.commands.arguments import ScriptArguments, parse
from jrlhf.config import to_dict
from jrlhf.errors import ConfigError


def arguments(argv: list[str], config_class: type, *more: type, verb: str) -> list[Any]:
    """The script arguments, the trainer's config, and any further group of fields."""
    script, config, *rest = parse(argv, ScriptArguments, config_class, *more, verb=verb)
    if script.dataset_name is None:
        raise ConfigError(f"jrlhf {verb} needs --dataset_name.")
    asked = {"dtype": script.dtype} if script.dtype != "float32" else {}
    if script.attn_implementation is not None:
        asked["attn_implementation"] = script.attn_implementation
    if asked := {**asked, **loading(script)}:
        init = {**asked, **(config.model_init_kwargs or {})}
        config = dataclasses.replace(config, model_init_kwargs=init)
    return [script, config, *rest]


def datasets(script: ScriptArguments, config: Any) -> tuple[Any, Any]:
    """The training set, and the evaluation set where the config evaluates."""
    from jrlhf.data.sources import load_rows

    if script.eval_dataset_name is not None and config.eval_strategy == "no":
        raise ConfigError(
            f"eval_dataset_name={script.eval_dataset_name!r} is never read with eval_strategy='no':"
            " write eval_strategy: epoch (or steps)."
        )
    train = load_rows(
        script.dataset_name,
        split=script.dataset_train_split,
        streaming=script.dataset_streaming,
        config=script.dataset_config,
    )
    if config.eval_strategy == "no":
        return train, None
    if script.eval_dataset_name is not None:
        return train, load_rows(
            script.eval_dataset_name, split=script.dataset_test_split, name="eval"
        )
    if Path(str(script.dataset_name)).is_file() and "[" not in script.dataset_test_split:
        raise ConfigError(
            f"{script.dataset_name} is a single file, so there is nothing else to evaluate on: set "
            "eval_dataset_name, or slices such as dataset_train_split='train[:90%]' and "
            "dataset_test_split='train[90%:]'."
        )
    return train, load_rows(
        script.dataset_name,
        split=script.dataset_test_split,
        name="eval",
        config=script.dataset_config,
    )


def start() -> None:
    """Joins the other processes, if the environment names any."""
    from jrlhf.sharding.distributed import initialize

    initialize()


def run(trainer: Any) -> int:
    """Trains, saves the model to output_dir/model and the config beside it."""
    target = Path(trainer.args.output_dir)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir={str(target)!r} cannot be made: {error}.") from None
    written = json.dumps(to_dict(trainer.args), indent=1, default=str)
    (target / "config.json").write_text(written, encoding="utf-8")
    trainer.train()
    trainer.save_model()
    print(f"Saved the model to {target / 'model'}.")
    return 0


def function(name: str) -> Any:
    """The reward function `module.attribute`; modules of the working directory are found too."""
    import importlib
    import sys

    module, _, attribute = name.rpartition(".")
    if not module:
        raise ConfigError(f"A reward function is named module.attribute, got {name!r}.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"The reward function {name!r} cannot be imported: {error}.") from None
