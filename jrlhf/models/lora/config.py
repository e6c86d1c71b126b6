"""`LoraConfig` with PEFT's field names, and adapter_config.json."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jrlhf.config import config, to_dict
from jrlhf.errors import ConfigError, MissingFileError, ModelError, UnsupportedFieldError, suggest
from jrlhf.models.families import family_of
from jrlhf.models.hf.reader import read_json
from jrlhf.models.spec import DecoderSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Where transformers has the classes of a type that is not the name of a module.
_ROOMS = {"gemma3_text": "gemma3"}
TASK_TYPES = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS")
# Values of init_lora_weights, and PEFT's others by how they begin.
INITS = (True, False, "gaussian", "orthogonal")
_OTHER_INITS = {
    **dict.fromkeys(("olora", "pissa", "loftq"), "changes the base"),
    **dict.fromkeys(("corda", "lora_ga"), "needs data and changes the base"),
    "eva": "needs data",
    "mica": "never trains B",
}
# Of these, what is an adapter like any other once it has drawn.
_DRAWS = ("eva",)

_VARIANT = "this variant of LoRA is not implemented"
# Fields of PEFT that are refused unless they ask for nothing; then also their neutral values.
_REFUSED = {
    "fan_in_fan_out": "the layout of each weight is known from its family; leave it out",
    "lora_bias": _VARIANT,
    "megatron_config": "modules are cut over devices by the mesh; leave it out",
    "trainable_token_indices": "train the whole table: modules_to_save=['embed_tokens']",
    "loftq_config": _VARIANT,
    "eva_config": _VARIANT,
    "corda_config": _VARIANT,
    "lora_ga_config": _VARIANT,
    "velora_config": _VARIANT,
    "kasa_config": _VARIANT,
    "alora_invocation_tokens": _VARIANT,
    "use_qalora": _VARIANT,
    "monteclora_config": _VARIANT,
    "layer_replication": _VARIANT,
    "runtime_config": _VARIANT,
    "target_parameters": "only linear maps can be adapted; name them in target_modules",
    "use_bdlora": _VARIANT,
    "arrow_config": _VARIANT,
    "inference_mode": "an adapter is trained where a trainer is given it; leave it out",
}
# What adapter_config.json holds besides the fields, and says nothing by it.
_SILENT = ("auto_mapping", "peft_type", "peft_version", "megatron_core", "qalora_group_size",
           "inference_mode", "fan_in_fan_out")  # fmt: skip


@config
class LoraConfig:
    """What to adapt and how, by PEFT's names, with PEFT's defaults.

    Attributes:
        r: rank.
        lora_alpha: the low-rank product is multiplied by lora_alpha / r.
        lora_dropout: probability with which an input of the low-rank path is dropped in training.
        target_modules: names of linear maps ("q_proj": of every layer), a regular expression for
            the whole name, or "all-linear"; None: the family's default (q_proj and v_proj).
        exclude_modules: the same, for what not to adapt.
        layers_to_transform: numbers of the layers to adapt; None: all.
        layers_pattern: name before that number, e.g. "layers".
        rank_pattern: {end of a module's name, or a regular expression for it: rank}.
        alpha_pattern: the same for lora_alpha.
        use_rslora: multiply by lora_alpha / sqrt(r) instead.
        use_dora: learn each output's magnitude apart from its direction (DoRA).
        modules_to_save: modules that are trained whole, as copies, and saved with the adapter.
        init_lora_weights: True (B = 0, A uniform), "gaussian" (B = 0, A normal with deviation 1/r),
            "orthogonal" (both random with B A = 0, even ranks) or False (both random: the adapted
            model is then not the base's).
        task_type: CAUSAL_LM, SEQ_CLS or TOKEN_CLS; the latter two save the head too.
        ensure_weight_tying: a saved embedding is also the head of a tied model.
        bias: only "none".
        base_model_name_or_path: written into adapter_config.json; None: the model's.
        revision: of the base, written likewise.
    """

    r: int = 8
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    task_type: str | None = None
    ensure_weight_tying: bool = False
    bias: Literal["none"] = "none"
    base_model_name_or_path: str | None = None
    revision: str | None = None

    REFUSED = _REFUSED
    UNORDERED = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
                 "modules_to_save")  # fmt: skip

    def __post_init__(self) -> None:
        # PEFT's TaskType is a string too, whose text is its name with the class in front.
        object.__setattr__(self, "task_type", getattr(self.task_type, "value", self.task_type))
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.ranks.items()}}
        alphas: dict[str, float] = {
            "lora_alpha": self.lora_alpha,
            **{f"alpha_pattern[{k!r}]": v for k, v in self.alphas.items()},
        }
        for name, value in ranks.items():
            _require(isinstance(value, int) and value >= 1, name, "must be at least 1", value)
        for name, alpha in alphas.items():
            number = isinstance(alpha, int | float)
            _require(number and alpha > 0, name, "must be positive", alpha)
        self._check_patterns()
        _require(0 <= self.lora_dropout < 1, "lora_dropout", "must lie in [0, 1)",
                 self.lora_dropout)  # fmt: skip
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise ConfigError(
                f"LoraConfig.task_type must be one of {TASK_TYPES}, got {self.task_type!r}."
                + suggest(str(self.task_type), TASK_TYPES)
            )
        self._check_init()
        chosen = self.layers_to_transform is not None
        if chosen and isinstance(self.target_modules, str):
            raise ConfigError(
                "LoraConfig.layers_to_transform needs target_modules as a list; with a regular "
                f"expression ({self.target_modules!r}) write the layers into it."
            )
        if self.layers_pattern and not chosen:
            raise ConfigError("LoraConfig.layers_pattern acts only with layers_to_transform.")

    def _check_patterns(self) -> None:
        """What is read as a regular expression is one."""
        expressions = {"rank_pattern": list(self.ranks), "alpha_pattern": list(self.alphas)}
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name) or ()
            if isinstance(value, str) or name in ("layers_pattern", "modules_to_save"):
                expressions[name] = [value] if isinstance(value, str) else list(value)
        for name, patterns in expressions.items():
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(
                        f"LoraConfig.{name}: {pattern!r} is no regular expression ({error})."
                    ) from error

    def _check_init(self) -> None:
        init = self.init_lora_weights
        if init in INITS:
            return
        for start, why in _OTHER_INITS.items():
            if str(init).startswith(start):
                raise UnsupportedFieldError(
                    f"LoraConfig.init_lora_weights={init!r} is not supported: it {why}; use one of "
                    f"{list(INITS)}."
                )
        raise ConfigError(
            f"LoraConfig.init_lora_weights must be one of {list(INITS)}, got {init!r}."
            + suggest(str(init), ["gaussian", "orthogonal"])
        )

    @property
    def ranks(self) -> dict[str, int]:
        return dict(self.rank_pattern or {})

    @property
    def alphas(self) -> dict[str, float]:
        return dict(self.alpha_pattern or {})

    def replace(self, **changes: Any) -> LoraConfig:
        """Returns a copy with the named fields changed and checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def _require(ok: bool, name: str, rule: str, value: object) -> None:
    if not ok:
        raise ConfigError(f"LoraConfig.{name} {rule}, got {value!r}.")


def as_config(given: Any) -> LoraConfig:
    """A LoraConfig as it is; PEFT's own, or a dict of its fields, as ours.

    Raises:
        UnsupportedFieldError: another method than LoRA, or a variant that is not implemented.
        ConfigError: a key that nobody knows, or something else than a config.
    """
    if isinstance(given, LoraConfig):
        return given
    values = given.to_dict() if callable(getattr(given, "to_dict", None)) else given
    if not isinstance(values, Mapping):
        raise ConfigError(f"peft_config must be a LoraConfig, got {type(given).__name__}.")
    method = values.get("peft_type") or "LORA"
    method = str(getattr(method, "value", method))
    if method != "LORA":
        raise UnsupportedFieldError(f"peft_type={method!r} is not supported, only 'LORA'.")
    # PEFT writes neutral values as null, false, [] or {}.
    known = {field.name for field in dataclasses.fields(LoraConfig)}  # type: ignore[arg-type]
    neutral: tuple[Any, ...] = (None, False, [], {})
    return LoraConfig(
        **{
            name: value
            for name, value in values.items()
            if name not in _SILENT and (name in known or value not in neutral)
        }
    )


def read_config(directory: Path) -> LoraConfig:
    """The config of an adapter directory, as PEFT or jrlhf wrote it.

    Raises:
        MissingFileError: no adapter_config.json.
        ConfigError, UnsupportedFieldError: as `as_config`, with the file's name.
    """
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise MissingFileError(f"{directory} has no {CONFIG_FILE}: it is not an adapter directory.")
    values = read_json(file)
    if str(values.get("init_lora_weights")) in _DRAWS:  # what it drew is in the file
        values = {**values, "init_lora_weights": True, "eva_config": None}
    try:
        return as_config(values)
    except ConfigError as error:
        raise type(error)(f"{file}: {error}") from None


def base_of(directory: Path) -> str | None:
    """The base that an adapter directory names; None: it is no (mere) adapter directory."""
    if not (directory / CONFIG_FILE).is_file() or (directory / "config.json").is_file():
        return None
    base = read_config(directory).base_model_name_or_path
    if base is None:
        raise ModelError(
            f"{directory / CONFIG_FILE} names no base_model_name_or_path: load the base, then "
            "jrlhf.peft.PeftModel.from_pretrained(base, ...)."
        )
    return base


def written_config(
    chosen: LoraConfig, *, spec: DecoderSpec, base: str | None, target_modules: list[str] | str
) -> Mapping[str, Any]:
    """adapter_config.json: the config with its modules resolved, and the keys that PEFT reads.

    PEFT's Auto classes find the base's class by the task, or else by `auto_mapping`.
    """
    values = to_dict(chosen)
    values["target_modules"] = target_modules
    values["rank_pattern"], values["alpha_pattern"] = chosen.ranks, chosen.alphas
    values["base_model_name_or_path"] = chosen.base_model_name_or_path or base
    return {
        **values, "peft_type": "LORA", "inference_mode": True, "fan_in_fan_out": False,
        "lora_bias": False, "auto_mapping": _class_of(spec) if chosen.task_type is None else None,
    }  # fmt: skip


def _class_of(spec: DecoderSpec) -> dict[str, str]:
    """transformers' class of a base, and the module that it is imported from."""
    room = _ROOMS.get(spec.model_type, spec.model_type)
    return {
        "base_model_class": family_of(spec).write(spec)["architectures"][0],
        "parent_library": f"transformers.models.{room}.modeling_{room}",
    }
