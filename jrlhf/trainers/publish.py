"""What a run leaves for others: the card of its model, and the upload to the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jrlhf import __version__
from jrlhf.config import HUB_ID, TrainingConfig, to_dict
from jrlhf.errors import HubError
from jrlhf.models import hub
from jrlhf.models.hf.writer import replace_file
from jrlhf.sharding.distributed import is_main

log = logging.getLogger(__name__)
CARD = "README.md"
# Where things lie on this machine, and who may write there, is nobody else's business.
_PRIVATE = ("output_dir", "logging_dir", "resume_from_checkpoint", "hub_token", "run_name")
_PACKAGES = ("jax", "flax", "optax", "transformers", "tokenizers", "datasets")
_PIPELINES = {"causal": "text-generation", "classifier": "text-classification"}


def hub_name(given: Any) -> str | None:
    """What was given, if it is a name on the hub and nothing on this machine."""
    local = not isinstance(given, str) or not HUB_ID.fullmatch(given) or Path(given).exists()
    return None if local or "/" not in given else given


def repository(args: TrainingConfig) -> str:
    """The repository that a run's model goes to."""
    return args.hub_model_id or Path(str(args.output_dir)).resolve().name


def create(args: TrainingConfig) -> None:
    """Makes the repository before hours of work are put into what could not be uploaded.

    Raises:
        HubError: the hub refuses it or cannot be reached.
    """
    if args.push_to_hub and is_main():
        hub.create(repository(args), token=args.hub_token, private=args.hub_private_repo)


def upload(
    args: TrainingConfig,
    directory: Path,
    message: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> str | None:
    """Uploads a saved model as the config says; what is given here wins.

    Returns:
        The commit's URL; None on the processes that upload nothing.
    """
    if not is_main():
        return None
    url = hub.upload(
        directory,
        repository(args),
        message=message,
        token=args.hub_token if token is None else token,
        private=args.hub_private_repo if private is None else private,
        revision=args.hub_revision if revision is None else revision,
    )
    log.info("Uploaded the model: %s", url)
    return url


class PushAtSave:
    """Callback: uploads the model after every checkpoint; a refusal does not end the run."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        try:
            self._trainer.push_to_hub(f"Training in progress, step {state.global_step}")
        except HubError as error:
            log.warning("The training goes on. %s", error)


# ------------------------------------------------------------------ the card


def write_card(
    directory: Path,
    trainer: Any,
    *,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | Iterable[str] | None = None,
) -> None:
    """Writes README.md: what hubs read at its head, then how the model was trained.

    Args:
        directory: of the saved model.
        trainer: whose model it is.
        model_name: heading; None: the repository's name.
        dataset_name: name of the training set on the hub.
        tags: more tags.
    """
    if not is_main():
        return
    name = model_name or repository(trainer.args).split("/")[-1]
    text = _card(trainer, name, dataset_name, tags)
    replace_file(directory / CARD, lambda file: Path(file).write_text(text, encoding="utf-8"))


def _card(trainer: Any, name: str, dataset: str | None, tags: str | Iterable[str] | None) -> str:
    from huggingface_hub import ModelCardData

    face, model = type(trainer).__name__, trainer.model
    method = face.removesuffix("Trainer")
    adapter = bool(model.net.adapters)
    own = ["generated_from_trainer", "jrlhf", method.lower(), *(["lora"] if adapter else [])]
    own += [tags] if isinstance(tags, str) else list(tags or ())
    base = hub_name(model.name_or_path)
    head = ModelCardData(
        base_model=base,
        datasets=dataset,
        library_name="peft" if adapter else "transformers",
        model_name=name,
        pipeline_tag=_PIPELINES.get(model.net.spec.head),
        tags=list(dict.fromkeys(own)),
    )
    start = f"[{base}](https://huggingface.co/{base})" if base else "a local model"
    data = f" on [{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else ""
    steps = trainer.state.global_step
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {name}",
        f"Made from {start} with jrlhf's `{face}`{data}: {steps} steps.",
        "## Training arguments",
        f"What differs from the defaults of `{type(trainer.args).__name__}`.",
        _table(("argument", "value"), _changed(trainer.args).items()),
        "## Metrics",
        _metrics(trainer.state.log_history),
        "## Versions",
        _table(("package", "version"), _versions().items()),
    ]
    return "\n\n".join(parts) + "\n"


def _changed(args: TrainingConfig) -> dict[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    return {
        name: value
        for name, value in to_dict(args).items()
        if name not in _PRIVATE and value != defaults[name]
    }


def _metrics(history: Iterable[Mapping[str, Any]]) -> str:
    """The last value of everything that was logged, with its step."""
    newest: dict[str, tuple[Any, Any]] = {}
    for entry in history:
        rest = {name: value for name, value in entry.items() if name not in ("step", "epoch")}
        newest |= {name: (value, entry.get("step")) for name, value in rest.items()}
    rows = ((name, value, step) for name, (value, step) in sorted(newest.items()))
    return _table(("metric", "value", "step"), rows) if newest else "None was logged."


def _versions() -> dict[str, str]:
    found = {name: metadata.version(name) for name in _PACKAGES}
    return {"jrlhf": __version__, **found, "platform": jax.default_backend()}


def _table(names: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [names, ("---",) * len(names), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    """A value in one line of a table; functions by their name."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = getattr(value, "__name__", None) or str(value)
    return " ".join(text.split()).replace("|", "\\|")
