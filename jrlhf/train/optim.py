"""Optimizers and learning-rate schedules by the names of transformers and TRL."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jrlhf.config import steps_of
from jrlhf.errors import ConfigError, suggest
from jrlhf.train.adam import scale_by_adam
from jrlhf.types import PyTree

Factor = Callable[[Float[Array, ""]], Array]


class OptimizerFields(Protocol):
    """The fields of a training config that are read here."""

    @property
    def optim(self) -> str: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def adam_beta1(self) -> float: ...
    @property
    def adam_beta2(self) -> float: ...
    @property
    def adam_epsilon(self) -> float: ...
    @property
    def lr_scheduler_type(self) -> str: ...
    @property
    def lr_scheduler_kwargs(self) -> Mapping[str, Any] | None: ...
    @property
    def warmup_steps(self) -> int | float: ...
    @property
    def warmup_ratio(self) -> float: ...


def make_optimizer(
    config: OptimizerFields, total_steps: int, *, axes: PyTree | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its schedule, as the config names them.

    Args:
        config: a training config.
        total_steps: updates of the whole run, where decaying schedules end.
        axes: logical axis names per trainable parameter; only muon needs them, to know which axes
            of a weight are inputs and which are outputs. Without them it treats matrices alone.

    Returns:
        (tx, schedule). `tx` includes the schedule and the sign: its updates are added.

    Raises:
        ConfigError: an unknown name, with a suggestion, or an argument the schedule does not have.
    """
    schedule = make_schedule(config, total_steps)
    name = _canonical(str(getattr(config.optim, "value", config.optim)))
    if name not in OPTIMIZERS:
        known = [*OPTIMIZERS, *_SAME]
        raise ConfigError(
            f"optim={name!r} is not known; known: {', '.join(OPTIMIZERS)}.{suggest(name, known)}"
        )
    return OPTIMIZERS[name](config, schedule, axes), schedule


# transformers' names of the same mathematics.
_SAME = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_torch_xla": "adamw",
    "adamw_hf": "adamw",
    "lion_32bit": "lion",
}


def _canonical(name: str) -> str:
    return _SAME.get(name, name)


# ------------------------------------------------------------------ optimizers

_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|_)norm($|_)")


def decay_mask(params: PyTree) -> PyTree:
    """True where weight decay acts: not on norms, biases and vectors, as in transformers.

    The choice is by name, because a stack of norm scales [l d] looks like a matrix.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> bool:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        return leaf.ndim > 1 and not any(_UNDECAYED.search(name) for name in names)

    return jax.tree_util.tree_map_with_path(one, params)


def _adamw(
    config: OptimizerFields, schedule: optax.Schedule, axes: PyTree | None
) -> optax.GradientTransformation:
    return optax.chain(
        scale_by_adam(config.adam_beta1, config.adam_beta2, config.adam_epsilon),
        _decay(config),
        optax.scale_by_learning_rate(schedule),
    )


def _sgd(
    config: OptimizerFields, schedule: optax.Schedule, axes: PyTree | None
) -> optax.GradientTransformation:
    """Without momentum, as transformers' "sgd"; there decoupled decay and L2 are the same."""
    return optax.chain(_decay(config), optax.sgd(schedule))


def _adafactor(
    config: OptimizerFields, schedule: optax.Schedule, axes: PyTree | None
) -> optax.GradientTransformation:
    """transformers' settings: no relative step, no scaling by the parameter, clip at 1.

    optax's own alias would apply the decay without the learning rate.
    """
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1),
        optax.clip_by_block_rms(1.0),
        _decay(config),
        optax.scale_by_learning_rate(schedule),
    )


def _lion(
    config: OptimizerFields, schedule: optax.Schedule, axes: PyTree | None
) -> optax.GradientTransformation:
    return optax.lion(
        schedule,
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def _muon(
    config: OptimizerFields, schedule: optax.Schedule, axes: PyTree | None
) -> optax.GradientTransformation:
    """Muon on the weights of hidden layers; adamw on embeddings, heads, norms and biases.

    Updates are scaled to adamw's usual size (0.2 root mean square, Liu et al. 2025), so that one
    learning rate fits both halves.
    """
    from optax import contrib

    if not hasattr(contrib, "muon"):
        raise ConfigError("optim='muon' needs a newer optax; this one has no optax.contrib.muon.")
    dimensions = _muon_dimensions(axes) if axes is not None else None
    return contrib.muon(
        schedule,
        weight_decay=config.weight_decay,
        weight_decay_mask=decay_mask,
        adam_b1=config.adam_beta1,
        adam_b2=config.adam_beta2,
        eps=config.adam_epsilon,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=dimensions,
    )


def _muon_dimensions(axes: PyTree) -> Callable[[PyTree], PyTree]:
    """Input and output axes by name: q [layers embed | heads e] maps embed to the rest."""
    from optax import contrib

    def one(names: tuple[str | None, ...]) -> Any:
        inner = [i for i, name in enumerate(names) if name != "layers"]
        if "layers" not in names or "embed" not in names or len(inner) < 2:
            return None
        embed = names.index("embed")
        rest = tuple(i for i in inner if i != embed)
        reads = embed == inner[0]
        return contrib.MuonDimensionNumbers(
            reduction_axis=(embed,) if reads else rest, output_axis=rest if reads else (embed,)
        )

    table = jax.tree.map(one, axes, is_leaf=lambda x: isinstance(x, tuple))
    return lambda params: table


def _decay(config: OptimizerFields) -> optax.GradientTransformation:
    return optax.add_decayed_weights(config.weight_decay, mask=decay_mask)


OPTIMIZERS: dict[
    str,
    Callable[[OptimizerFields, optax.Schedule, PyTree | None], optax.GradientTransformation],
] = {"adamw": _adamw, "sgd": _sgd, "adafactor": _adafactor, "lion": _lion, "muon": _muon}


# ------------------------------------------------------------------ schedules


def warmup(config: OptimizerFields, total_steps: int) -> int:
    """Steps of warm-up; `warmup_steps` wins over `warmup_ratio`."""
    given = steps_of(config.warmup_steps, total_steps)
    return given or math.ceil(total_steps * config.warmup_ratio)


def make_schedule(config: OptimizerFields, total_steps: int) -> optax.Schedule:
    """The learning rate of update number `count` (from 0), as transformers' get_scheduler."""
    name = str(getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type))
    if name not in SCHEDULES:
        raise ConfigError(
            f"lr_scheduler_type={name!r} is not known; known: {', '.join(SCHEDULES)}."
            + suggest(name, SCHEDULES)
        )
    peak, start = config.learning_rate, warmup(config, total_steps)
    build, defaults = SCHEDULES[name]
    options = _schedule_options(name, defaults, config.lr_scheduler_kwargs or {})
    after = build(peak, start, max(1, total_steps - start), **options)
    ramped = name != "constant"

    def schedule(count: Any) -> Array:
        now = jnp.asarray(count, jnp.float32)
        rising = now / max(1, start)
        factor = jnp.where(now < start, rising, after(now - start)) if ramped else after(now)
        return jnp.asarray(peak * factor, jnp.float32)

    return schedule


def _schedule_options(
    name: str, defaults: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """A schedule's own arguments: numbers that are not negative, or what it has by default."""
    if unknown := sorted(set(given) - set(defaults)):
        raise ConfigError(
            f"lr_scheduler_kwargs of {name!r} has no {unknown[0]!r}; "
            f"it takes {', '.join(defaults) or 'none'}.{suggest(unknown[0], defaults)}"
        )
    options = dict(defaults)
    for key, value in given.items():
        if value == defaults[key]:
            continue
        try:
            options[key] = number = float(value)  # YAML 1.1 reads 1e-5 as text
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not 0 <= number < math.inf:
            raise ConfigError(
                f"lr_scheduler_kwargs: {key} must be a number from 0 up, got {value!r}."
            )
    return options


# Each takes (peak rate, warm-up steps, steps after the warm-up) and its own arguments, and gives
# the factor at so many steps after the warm-up.


def _constant(peak: float, start: int, steps: int) -> Factor:
    return jnp.ones_like


def _linear(peak: float, start: int, steps: int) -> Factor:
    return lambda t: jnp.maximum(0.0, (steps - t) / steps)


def _cosine(peak: float, start: int, steps: int, *, num_cycles: float) -> Factor:
    return lambda t: jnp.maximum(0.0, 0.5 * (1 + jnp.cos(2 * jnp.pi * num_cycles * t / steps)))


def _restarts(peak: float, start: int, steps: int, *, num_cycles: float) -> Factor:
    def factor(t: Array) -> Array:
        # In whole steps: t / steps * cycles would round to the wrong side of a restart.
        phase = jnp.mod(t * num_cycles, steps) / steps
        return jnp.where(t >= steps, 0.0, 0.5 * (1 + jnp.cos(jnp.pi * phase)))

    return factor


def _cosine_with_min_lr(
    peak: float,
    start: int,
    steps: int,
    *,
    num_cycles: float,
    min_lr: float | None,
    min_lr_rate: float | None,
) -> Factor:
    if (min_lr is None) == (min_lr_rate is None):
        raise ConfigError(
            "cosine_with_min_lr needs one of lr_scheduler_kwargs={'min_lr': …} and "
            "{'min_lr_rate': …}."
        )
    if min_lr is not None and min_lr >= peak:
        raise ConfigError(f"min_lr={min_lr} must be less than learning_rate={peak}.")
    low = min_lr / peak if min_lr is not None else float(min_lr_rate or 0)
    cosine = _cosine(peak, start, steps, num_cycles=num_cycles)
    return lambda t: jnp.maximum(0.0, cosine(t) * (1 - low) + low)


def _polynomial(peak: float, start: int, steps: int, *, lr_end: float, power: float) -> Factor:
    if lr_end >= peak:
        raise ConfigError(f"lr_end={lr_end} must be less than learning_rate={peak}.")
    low = lr_end / peak
    return lambda t: (1 - low) * jnp.maximum(0.0, 1 - t / steps) ** power + low


def _inverse_sqrt(peak: float, start: int, steps: int, *, timescale: float | None) -> Factor:
    scale = timescale or start or 10_000
    return lambda t: jax.lax.rsqrt((t + scale) / scale)


SCHEDULES: dict[str, tuple[Callable[..., Factor], dict[str, Any]]] = {
    "linear": (_linear, {}),
    "cosine": (_cosine, {"num_cycles": 0.5}),
    "cosine_with_restarts": (_restarts, {"num_cycles": 1}),
    "cosine_with_min_lr": (
        _cosine_with_min_lr,
        {"num_cycles": 0.5, "min_lr": None, "min_lr_rate": None},
    ),
    "polynomial": (_polynomial, {"lr_end": 1e-7, "power": 1.0}),
    "constant": (_constant, {}),
    "constant_with_warmup": (_constant, {}),
    "inverse_sqrt": (_inverse_sqrt, {"timescale": None}),
}
