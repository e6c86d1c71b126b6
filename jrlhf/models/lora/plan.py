"""Which modules an adapter adapts: a `LoraConfig` and a family's names decide, as in PEFT.

The plan is static and hashable (part of a `Net`), and is made before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from jrlhf.errors import ConfigError, suggest
from jrlhf.models.families import Weight
from jrlhf.models.families.weights import Part
from jrlhf.models.lora.config import LoraConfig

Path = tuple[str, ...]
# The family's rows, each with (name in the checkpoint, path in params, index along the stack).
Weights = Sequence[tuple[Weight, Sequence[tuple[str, Path, Any]]]]
# PEFT's default where a config names no module, and it knows the family.
_DEFAULTS = {
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "opt",
         "gptj"), ("q_proj", "v_proj"),
    ),
}  # fmt: skip
ALL_LINEAR = "all-linear"
_HEADS = ("classifier", "score")
EMBEDDING: Path = ("embed", "table")


@dataclasses.dataclass(frozen=True)
class Linears:
    """A linear map, or a stack of them, as the plan sees it.

    Attributes:
        path: of the module in params.
        names: its name in the checkpoint, one per position of the stack.
        stacked: whether params stack it.
        inputs: its kernel's input axes (0, 1, ...), in the order in which the checkpoint merges
            them into one.
        outputs: the same of its output axes, counted from 0 too.
        part: where the checkpoint fuses several maps (q, k and v), the stripes of its outputs.
        source: of a fused map but the first, the first one's path: it has the A of all of them.
    """

    path: Path
    names: tuple[str, ...]
    stacked: bool
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    part: Part | None = None
    source: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target(Linears):
    """An adapted (stack of) linear maps.

    Attributes:
        ranks: per position; 0 where the map is left alone.
        scales: per position, what multiplies B A.
    """

    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def rank(self) -> int:
        """The rank that all positions are padded to."""
        return max(self.ranks)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The plan of one adapter.

    Attributes:
        name: the key of its tree in params["adapters"].
        targets: what is adapted.
        saved: paths of the leaves that it has copies of.
        dropout: rate on the inputs of its low-rank paths in training.
        dora: whether magnitudes are learnt.
        init: `LoraConfig.init_lora_weights`.
        tied_head: the tensor of a head that is the saved embedding; PEFT keeps it in its files.
    """

    name: str
    targets: tuple[Target, ...]
    saved: tuple[Path, ...] = ()
    dropout: float = 0.0
    dora: bool = False
    init: bool | str = True
    tied_head: str = ""


def plan(
    chosen: LoraConfig,
    linears: Sequence[Linears],
    weights: Weights,
    *,
    model_type: str,
    tied: str,
    name: str = "default",
    strict: bool = True,
) -> Adapter:
    """Makes the plan.

    Args:
        chosen: the user's config.
        linears: every linear map of the model (`tree.linears`).
        weights: the family's weight rows, each with its places in params.
        model_type: the family's name.
        tied: the head's tensor in a checkpoint, if the embedding is the head as well; else "".
        name: of the adapter.
        strict: every entry of target_modules must name something (PEFT's own files may hold more).

    Raises:
        ConfigError: nothing is targeted, or a name that the model does not have.
    """
    wanted = resolved_targets(chosen, linears, model_type)
    every = [module for stack in linears for module in stack.names]
    matches = functools.cache(lambda module: _targeted(chosen, wanted, module))
    some = any(map(matches, every))
    if strict or not some:
        _check_layers(chosen, every, model_type)
    if not some:
        raise _nothing_named(chosen, wanted, every, model_type)
    if strict and not isinstance(wanted, str):
        _check_each(wanted, every, model_type)
    targets = []
    for stack in linears:
        if any(map(matches, stack.names)):
            pairs = [_rank_and_scale(chosen, m) if matches(m) else (0, 0.0) for m in stack.names]
            ranks, scales = zip(*pairs, strict=True)
            own = {field.name: getattr(stack, field.name) for field in dataclasses.fields(Linears)}
            targets.append(Target(**own, ranks=ranks, scales=scales))
            _check_ranks(chosen, targets[-1])
    saved = _saved(chosen, weights, tied=tied, strict=strict)
    return Adapter(
        name,
        tuple(targets),
        saved,
        chosen.lora_dropout,
        chosen.use_dora,
        chosen.init_lora_weights,
        tied if EMBEDDING in saved else "",
    )


def resolved_targets(
    chosen: LoraConfig, linears: Sequence[Linears], model_type: str
) -> Sequence[str] | str:
    """target_modules with "all-linear" and None replaced by names."""
    wanted = chosen.target_modules
    if wanted is None:
        if model_type not in _DEFAULTS:
            raise ConfigError(
                f"LoraConfig.target_modules is None, and {model_type} has no default; give a list "
                f"of names or {ALL_LINEAR!r}."
            )
        return list(_DEFAULTS[model_type])
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return [module for stack in linears for module in stack.names]
    return wanted


def names_of(adapter: Adapter, linears: Sequence[Linears]) -> list[str]:
    """What adapter_config.json names: the shortest names that mean exactly this plan's modules."""
    chosen = {n for t in adapter.targets for n, r in zip(t.names, t.ranks, strict=True) if r}
    short = sorted({module.rsplit(".", 1)[-1] for module in chosen})
    every = [module for stack in linears for module in stack.names]
    meant = {module for module in every if _ends_with(module, short)}
    return short if meant == chosen else sorted(chosen)


def _check_layers(chosen: LoraConfig, every: Sequence[str], model_type: str) -> None:
    """layers_to_transform and layers_pattern name layers that there are."""
    wanted = chosen.layers_to_transform
    if wanted is None or wanted == []:
        return
    layers = {number for module in every if (number := _layer_of(chosen, module)) is not None}
    if not layers:
        raise ConfigError(
            f"LoraConfig.layers_pattern={chosen.layers_pattern!r} is not what stands before the "
            f"layers' numbers in this {model_type}; its modules are called like {every[0]}."
        )
    if not layers.issuperset([wanted] if isinstance(wanted, int) else wanted):
        raise ConfigError(
            f"LoraConfig.layers_to_transform={wanted!r} names a layer that this {model_type} does "
            f"not have; it has {len(layers)} layers, {min(layers)} to {max(layers)}."
        )


def _nothing_named(
    chosen: LoraConfig, wanted: Sequence[str] | str, every: Sequence[str], model_type: str
) -> ConfigError:
    """Why nothing is adapted."""
    given = f"LoraConfig.target_modules={chosen.target_modules!r}"
    if any(_names(wanted, module) for module in every):
        others = ("exclude_modules", "modules_to_save", "layers_to_transform")
        acting = " and ".join(name for name in others if getattr(chosen, name) not in (None, []))
        return ConfigError(f"{given}: nothing of it is left to adapt by {acting}.")
    short = sorted({module.rsplit(".", 1)[-1] for module in every})
    hint = suggest(wanted[0], short) if isinstance(wanted, (list, tuple)) and wanted else ""
    return ConfigError(
        f"{given} names no linear map of this {model_type}; it has {', '.join(short)}.{hint}"
    )


def _check_ranks(chosen: LoraConfig, target: Target) -> None:
    """An orthogonal matrix's rows are dealt out to A and B, half to each."""
    for name, rank in zip(target.names, target.ranks, strict=True):
        if chosen.init_lora_weights == "orthogonal" and rank % 2:
            raise ConfigError(
                f"LoraConfig.init_lora_weights='orthogonal' needs even ranks; {name} has {rank}."
            )


def _check_each(wanted: Sequence[str], every: Sequence[str], model_type: str) -> None:
    for entry in wanted:
        if not any(_ends_with(module, [entry]) for module in every):
            short = sorted({module.rsplit(".", 1)[-1] for module in every})
            raise ConfigError(
                f"LoraConfig.target_modules: {entry!r} is no linear map of this {model_type}; it "
                f"has {', '.join(short)}. Embeddings and heads can be trained whole, by "
                f"modules_to_save.{suggest(entry, short)}"
            )


def _ends_with(module: str, endings: Iterable[str]) -> bool:
    return any(module == ending or module.endswith(f".{ending}") for ending in endings)


def _targeted(chosen: LoraConfig, wanted: Sequence[str] | str, module: str) -> bool:
    """Whether PEFT would adapt the module."""
    excluded = chosen.exclude_modules
    if isinstance(excluded, str):
        if re.fullmatch(excluded, module):
            return False
    elif excluded and _ends_with(module, excluded):
        return False
    for whole in chosen.modules_to_save or ():
        if re.match(rf"(^|.*\.){whole}($|\..*)", module):
            return False
    return _names(wanted, module) and (isinstance(wanted, str) or _layer_wanted(chosen, module))


def _names(wanted: Sequence[str] | str, module: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return _ends_with(module, wanted)


def _layer_wanted(chosen: LoraConfig, module: str) -> bool:
    layers = chosen.layers_to_transform
    if layers is None or layers == []:
        return True
    return _layer_of(chosen, module) in ([layers] if isinstance(layers, int) else layers)


def _layer_of(chosen: LoraConfig, module: str) -> int | None:
    """The number of the layer that a module lies in; None: of none that layers_pattern means."""
    patterns = chosen.layers_pattern or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns)
    return next((int(match[1]) for match in found if match), None)


def _rank_and_scale(chosen: LoraConfig, module: str) -> tuple[int, float]:
    rank = _by_pattern(chosen.ranks, module, chosen.r)
    alpha = _by_pattern(chosen.alphas, module, chosen.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if chosen.use_rslora else rank)


def _by_pattern(table: dict[str, int] | dict[str, float], module: str, default: float) -> int:
    """The value of the first pattern that matches the end of the module's name."""
    for pattern, value in table.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value  # type: ignore[return-value]
    return default  # type: ignore[return-value]


def _saved(
    chosen: LoraConfig,
    weights: Weights,
    *,
    tied: str,
    strict: bool,
) -> tuple[Path, ...]:
    """Paths of the leaves that belong to modules_to_save."""
    own = list(chosen.modules_to_save or ())
    automatic = _HEADS if chosen.task_type in ("SEQ_CLS", "TOKEN_CLS") else ()
    wanted = [*own, *(head for head in automatic if head not in own)]
    paths: dict[Path, None] = {}
    used: set[str] = set()
    for _, places in weights:
        hits: dict[Path, list[bool]] = {}
        for tensor, path, _ in places:
            found = [entry for entry in wanted if _within(tensor, entry)]
            hits.setdefault(path, []).append(bool(found))
            used.update(found)
        for path, whole in hits.items():
            if any(whole) and not all(whole):
                raise ConfigError(
                    f"LoraConfig.modules_to_save={own} names a module of some layers only; "
                    "layers are stacked, so name it for all of them."
                )
            if all(whole):
                paths[path] = None
    if heads := {entry for entry in wanted if tied and _within(tied, entry)}:
        paths[EMBEDDING] = None
        used |= heads
    for entry in own if strict else ():
        if entry not in used and entry not in _HEADS:
            known = sorted({part for row, _ in weights for part in row.name.split(".")[:-1]})
            raise ConfigError(
                f"LoraConfig.modules_to_save: the model has no {entry!r}.{suggest(entry, known)}"
            )
    if tied and EMBEDDING in paths and not chosen.ensure_weight_tying:
        raise ConfigError(
            "LoraConfig.modules_to_save names the embedding of a model whose head is tied to it, "
            "or the head: set ensure_weight_tying=True, and both are trained as one."
        )
    return tuple(paths)


def _within(tensor: str, entry: str) -> bool:
    """Whether a tensor belongs to a module whose name ends with the entry (PEFT's rule)."""
    parts = tensor.split(".")[:-1]
    return any(".".join(parts[: i + 1]).endswith(entry) for i in range(len(parts)))
