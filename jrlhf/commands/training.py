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
    if asked := {**asked, **loading(script)}:
        init = {**asked, **(config.model_init_kwargs or {})}
        config = dataclasses.replace(config, model_init_kwargs=init)
    return [script, config, *rest]


def datasets(script: ScriptArguments, config: Any) -> tuple[Any, Any]:
    """The training set, and the evaluation set where the config evaluates."""
    from jrlhf.data.sources import load_rows

    train = load_rows(
        script.dataset_name,
        split=script.dataset_train_split,
        streaming=script.dataset_streaming,
        config=script.dataset_config,
    )
    if config.eval_strategy == "no":
        return train, None
    source = script.eval_dataset_name or script.dataset_name
    split = script.dataset_test_split
    return train, load_rows(source, split=split, name="eval", config=script.dataset_config)


def start() -> None:
    """Joins the other processes, if the environment names any."""
    from jrlhf.sharding.distributed import initialize

    initialize()


def run(trainer: Any) -> int:
    """Trains, saves the model to output_dir/model and the config beside it."""
    target = Path(trainer.args.output_dir)
    target.mkdir(parents=True, exist_ok=True)
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
