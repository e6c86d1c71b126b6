"""Configuration: frozen dataclasses with TRL's field names.

Every public config is `@config class DPOConfig(DPO, TrainingConfig)`: the algorithm's
hyperparameters (declared once, in `algos/`) beside the fields of the training run. `@config` gives
the class TRL's manners: old names are translated with a DeprecationWarning, known fields that
cannot work here are refused by name, any other unknown key is an error with a suggestion.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import types
import typing
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from jrlhf.errors import ConfigError, UnsupportedFieldError, suggest
from jrlhf.foreign import AS_YOU_LIKE, ASKS_NOTHING, REFUSED, WITHOUT_EFFECT

T = TypeVar("T")

# An id on the Hugging Face hub.
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The fields every trainer shares, by transformers' and TRL's names.

    Attributes:
        output_dir: where metrics, checkpoints and the model go; None: "<model>-<trainer>".
        per_device_train_batch_size: examples per data shard and micro-batch. The global batch is
            this times the mesh's data and fsdp axes times `gradient_accumulation_steps`.
        per_device_eval_batch_size: the same for evaluation.
        gradient_accumulation_steps: micro-batches summed into one update.
        learning_rate: peak learning rate.
        weight_decay: decoupled weight decay; never on norms and biases.
        adam_beta1: decay of the first moment (also lion's).
        adam_beta2: decay of the second moment (also lion's).
        adam_epsilon: added to the root of the second moment.
        max_grad_norm: global-norm clip; 0 turns it off.
        num_train_epochs: passes over the data; may be fractional.
        max_steps: optimizer steps; > 0 overrides `num_train_epochs`.
        lr_scheduler_type: linear, cosine, cosine_with_min_lr, constant, constant_with_warmup, ….
        lr_scheduler_kwargs: extra arguments of the schedule, e.g. {"min_lr_rate": 0.1}.
        warmup_ratio: share of the steps spent warming up; `warmup_steps` wins.
        warmup_steps: steps of linear warm-up; below 1: their share of the run.
        optim: adamw, sgd, adafactor, lion or muon (transformers' adamw_* names mean adamw).
        logging_steps: log every so many steps; below 1 (also of the two below): every so large a
            share of the run.
        eval_strategy: "no", "steps" or "epoch".
        eval_steps: with "steps": evaluate every so many (default: logging_steps).
        save_strategy: "no", "steps" or "epoch".
        save_steps: with "steps": checkpoint every so many.
        save_total_limit: keep so many checkpoints; None keeps all.
        seed: of everything random; with `data_seed` None also of the data order.
        data_seed: seed of the data order alone.
        bf16: compute in bfloat16 with float32 master weights; None: on for TPU and GPU, off on CPU.
        gradient_checkpointing: recompute activations in the backward pass.
        gradient_checkpointing_kwargs: {"policy": name of a remat policy}.
        num_layers_unfrozen: train only the top so many layers (trlX's name); -1 trains all.
        mesh: device mesh, {"data": 1, "fsdp": 4, "tensor": 2} or "data=1,fsdp=4"; -1 fills up.
        report_to: "tensorboard", "wandb", a list of them, or None ("none") for metrics.jsonl alone.
        run_name: name of the run in W&B.
        logging_dir: directory of TensorBoard's files; None: `output_dir/runs`.
        dataloader_drop_last: drop the last short batch instead of padding it with empty rows (PPO,
            GRPO: instead of filling the last rollout with prompts of the next epoch).
        pad_to_multiple_of: sequence lengths are rounded up to this (PPO, GRPO: those of prompts).
        disable_tqdm: True prints plain lines; None: a bar on a terminal, lines elsewhere.
        resume_from_checkpoint: True (the newest), or a checkpoint's path.
        model_init_kwargs: arguments of `from_pretrained`; the model must be given by name.
        push_to_hub: upload the saved model to the Hugging Face hub; see `hub_strategy`.
        hub_model_id: "name" or "organisation/name"; None: the name of `output_dir`.
        hub_strategy: "every_save": at `save_model` and at every checkpoint, "end": at `save_model`.
        hub_token: a token that may write; None: HF_TOKEN, or the one of `hf auth login`.
        hub_private_repo: makes a new repository private; None: as the organisation has it.
        hub_revision: a branch; None: main.
    """

    output_dir: str | None = None
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    num_train_epochs: float = 3.0
    max_steps: int = -1
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_ratio: float = 0.0
    warmup_steps: int | float = 0
    optim: str = "adamw"
    logging_steps: int | float = 10
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    eval_steps: int | float | None = None
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    save_steps: int | float = 500
    save_total_limit: int | None = None
    seed: int = 42
    data_seed: int | None = None
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    num_layers_unfrozen: int = -1
    mesh: dict[str, int] | str | None = None
    report_to: str | list[str] | None = None
    run_name: str | None = None
    logging_dir: str | None = None
    dataloader_drop_last: bool = False
    pad_to_multiple_of: int = 8
    disable_tqdm: bool | None = None
    resume_from_checkpoint: bool | str | None = None
    model_init_kwargs: dict[str, Any] | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_strategy: Literal["end", "every_save"] = "every_save"
    hub_token: str | None = None
    hub_private_repo: bool | None = None
    hub_revision: str | None = None

    ALIASES: ClassVar[dict[str, str]] = {
        "evaluation_strategy": "eval_strategy",
        "log_with": "report_to",
        "batch_size": "per_device_train_batch_size",
    }

    def __post_init__(self) -> None:
        for name in ("output_dir", "logging_dir"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, os.path.expanduser(path))
        check_counts(self, "per_device_train_batch_size", "per_device_eval_batch_size",
                     "gradient_accumulation_steps", "pad_to_multiple_of")  # fmt: skip
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps",
                     "adam_epsilon"):  # fmt: skip
            _check(0 <= getattr(self, name) < math.inf, self, name, "must not be negative or inf")
        for name in ("logging_steps", "save_steps", "eval_steps", "warmup_steps"):
            value = getattr(self, name)
            whole = value is None or value < 1 or float(value).is_integer()
            _check(whole, self, name, "must be a whole number of steps or a share below 1")
            _check(value is None or value > 0 or name == "warmup_steps", self, name,
                   "must be at least 1, or a share of the run between 0 and 1")  # fmt: skip
        for name in ("adam_beta1", "adam_beta2"):
            _check(0 <= getattr(self, name) < 1, self, name, "must lie in [0, 1)")
        _check(abs(self.seed) < 2**32, self, "seed", "must be below 2**32")
        _check(0 <= self.warmup_ratio <= 1, self, "warmup_ratio", "must lie in [0, 1]")
        if hasattr(self, "max_length"):  # of the offline trainers
            check_counts(self, "max_length")
        _check(self.max_steps > 0 or 0 < self.num_train_epochs < math.inf, self, "num_train_epochs",
               "must be positive unless max_steps is")  # fmt: skip
        _check(self.hub_model_id is None or HUB_ID.fullmatch(self.hub_model_id) is not None, self,
               "hub_model_id", 'must be "name" or "organisation/name"')  # fmt: skip


def _check(ok: bool, owner: Any, name: str, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{type(owner).__name__}.{name} {rule}, got {getattr(owner, name)!r}.")


def steps_of(value: int | float, total_steps: int) -> int:
    """A field that counts steps, or below 1 names their share of the run."""
    return math.ceil(value * total_steps) if 0 < value < 1 else int(value)


def check_counts(cfg: Any, *names: str) -> None:
    """Raises ConfigError unless each of the fields is None or at least 1."""
    for name in names:
        value = getattr(cfg, name)
        _check(value is None or value >= 1, cfg, name, "must be at least 1")


def refuse_changed(cfg: Any, reasons: Mapping[str, str]) -> None:
    """Refuses shared fields that mean nothing to this config, unless they have their defaults.

    Args:
        cfg: a config.
        reasons: field -> what to do instead.

    Raises:
        UnsupportedFieldError: one of them was changed.
    """
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in reasons and value != field.default:
            raise UnsupportedFieldError(
                f"{type(cfg).__name__}.{field.name}={value!r} is not supported: "
                f"{reasons[field.name]}."
            )


def config(cls: type[T]) -> type[T]:
    """Class decorator: a frozen keyword-only dataclass that knows old and refused names."""
    # Each parent checks its own fields; without this only the first parent's check would run.
    checks = [b.__dict__["__post_init__"] for b in cls.__mro__ if "__post_init__" in b.__dict__]

    def __post_init__(self: Any) -> None:
        for check in checks:
            check(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    build = made.__init__
    needed = [f.name for f in dataclasses.fields(made) if f.default is dataclasses.MISSING]  # type: ignore[arg-type]

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        if args:
            raise ConfigError(f"{made.__name__} takes keyword arguments only, got {args!r}.")
        values = translate(made, values)
        missing = [name for name in needed if name not in values]
        if missing:
            raise ConfigError(f"{made.__name__} needs {', '.join(missing)}.")
        build(self, **check_types(made, values))

    made.__init__ = __init__  # type: ignore[method-assign]
    return made


def aliases(cls: type) -> dict[str, str]:
    """All other names of a config class's fields: ALIASES are old, SYNONYMS are short."""
    table: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        table.update(base.__dict__.get("ALIASES", {}))
    return table | getattr(cls, "SYNONYMS", {})


def foreign_names(cls: type) -> set[str]:
    """Names of TRL and transformers that are no fields of this class, but that it answers to."""
    common = {*REFUSED, *WITHOUT_EFFECT} if issubclass(cls, TrainingConfig) else set()
    return common | {*getattr(cls, "REFUSED", {})}


def translate(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Renames old fields, refuses the impossible and the unknown.

    Raises:
        UnsupportedFieldError: a field of TRL or transformers that cannot work here.
        ConfigError: an unknown field, or an old and a new name given together.
    """
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    old = aliases(cls)
    refused = {**REFUSED, **getattr(cls, "REFUSED", {})}
    out: dict[str, Any] = {}
    for name, value in values.items():
        target = name
        if name in old and name not in known:
            target = old[name]
            if name not in getattr(cls, "SYNONYMS", {}):
                text = f"{cls.__name__}: {name} is now {target}."
                warnings.warn(text, DeprecationWarning, stacklevel=3)
        elif name not in known:
            if name in WITHOUT_EFFECT and issubclass(cls, TrainingConfig):
                _say_once(f"{cls.__name__}: {name} changes nothing: {WITHOUT_EFFECT[name]}.")
                continue
            if name in refused and value in (None, False, *ASKS_NOTHING.get(name, ())):
                continue
            if name in refused:
                raise UnsupportedFieldError(
                    f"{cls.__name__}: {name} is not supported: {refused[name]}."
                )
            hint = suggest(name, [*known, *old])
            raise ConfigError(f"{cls.__name__} has no field {name!r} (value {value!r}).{hint}")
        elif value in AS_YOU_LIKE.get(name, ()):
            continue
        if target in out or (target != name and target in values):
            raise ConfigError(
                f"{cls.__name__}: {name} and {target} mean the same; give one of them."
            )
        out[target] = value
    return out


@functools.lru_cache
def _say_once(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)


def check_types(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Converts what loses nothing by it (1 -> 1.0, "1e-5" -> 1e-5) and refuses the rest."""
    hints = typing.get_type_hints(cls)
    unordered = getattr(cls, "UNORDERED", ())
    listed = {n: _listed(value) if n in unordered else value for n, value in values.items()}
    return {name: _convert(cls.__name__, name, hints[name], v) for name, v in listed.items()}


def _listed(value: Any) -> Any:
    """A tuple or a set as a list; a set's order differs from run to run, so it is sorted."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=lambda x: (x if isinstance(x, int) else 0, str(x)))
    return list(value) if isinstance(value, tuple) else value


def _convert(owner: str, name: str, kind: Any, value: Any) -> Any:
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for member in members:
        if isinstance(value, list) and get_origin(member) is list:
            (kind,) = get_args(member) or (Any,)
            return [_convert(owner, f"{name}[{i}]", kind, x) for i, x in enumerate(value)]
    for member in members:
        if _is_instance(value, member):
            return value
    for member in members:
        if member is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if member is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if member in (float, int) and isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
            try:
                return member(value)
            except ValueError:
                continue
    choices = [c for m in members if get_origin(m) is Literal for c in get_args(m)]
    if choices:
        hint = suggest(str(value), [str(c) for c in choices])
        raise ConfigError(f"{owner}.{name} must be one of {choices}, got {value!r}.{hint}")
    wanted = " or ".join(getattr(m, "__name__", str(m)) for m in members)
    raise ConfigError(f"{owner}.{name} must be {wanted}, got {value!r} ({type(value).__name__}).")


def _is_instance(value: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if kind is Any:
        return True
    if kind is None or kind is type(None):
        return value is None
    if origin is Literal:
        return value in get_args(kind)
    if origin is not None:
        return isinstance(value, origin)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, kind) if isinstance(kind, type) else True


def to_dict(cfg: Any) -> dict[str, Any]:
    """The config as JSON-ready values, for logs and checkpoints; no secret is among them."""
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    return values | ({"hub_token": "<HUB_TOKEN>"} if values.get("hub_token") else {})
