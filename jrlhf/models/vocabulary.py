"""The number of tokens of a model: made larger or smaller, or rounded up with rows that are none.

Padding follows the rows of real tokens and is zero. Nobody reads it: the embedding is indexed by
tokens, and every maker of logits sets the columns from `vocab_size` on to -inf, so that neither a
loss nor a gradient knows of them.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jrlhf.errors import ConfigError
from jrlhf.models.build_encoder import AnyNet
from jrlhf.models.match import VOCABULARY

Params = dict[str, Any]
# Of the covariance of the new rows, relative to that of the old ones (as in transformers).
_SPREAD = 1e-9


def padding(size: int, multiple: int) -> int:
    """Rows that round a vocabulary up.

    Raises:
        ConfigError: `multiple` is below 1.
    """
    if not isinstance(multiple, int) or multiple < 1:
        raise ConfigError(
            f"A vocabulary is padded to a whole multiple of at least 1, got {multiple!r}."
        )
    return -size % multiple


def resized(
    net: AnyNet, params: Params, size: int, *, multiple: int, at_mean: bool, key: Array
) -> tuple[AnyNet, Params]:
    """A net with another vocabulary, and its params; all other leaves are shared.

    Args:
        net: the model.
        params: its params.
        size: tokens, at least 1.
        multiple: of which the rows of the table are a multiple; what is beyond `size` is padding.
        at_mean: new tokens get the mean of the old rows and a trace of their spread, so that the
            others keep their probabilities nearly; else N(0, initializer_range^2).
        key: randomness of the new rows.

    Raises:
        ConfigError: no tokens, or a multiple below 1.
    """
    if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
        raise ConfigError(f"A vocabulary has at least one token, a whole number, got {size!r}.")
    size = int(size)
    old = net.spec.vocab_size
    beyond = padding(size, multiple)
    params = {name: dict(leaf) if name in ("embed", "head") else leaf
              for name, leaf in params.items()}  # fmt: skip

    def change(leaf: Array, axis: int, key: Array) -> Array:
        rows = jnp.moveaxis(leaf, axis, 0)[:old]
        added = (max(size - old, 0), *rows.shape[1:])
        if at_mean:
            new = _near_mean(rows.astype(jnp.float32), key, added[0])
        else:
            scale = net.spec.initializer_range if leaf.ndim > 1 else 0.0
            new = scale * jax.random.normal(key, added)
        none = jnp.zeros((beyond, *rows.shape[1:]), leaf.dtype)
        whole = jnp.concatenate((rows[:size], new.astype(leaf.dtype), none))
        return jnp.moveaxis(whole, 0, axis)

    for number, ((group, name), axis) in enumerate(VOCABULARY.items()):
        if name in params.get(group, {}):
            own = jax.random.fold_in(key, number)
            params[group][name] = jax.jit(change, static_argnums=1)(params[group][name], axis, own)
    return net.of(net.spec.replace(vocab_size=size, vocab_padding=beyond)), params


def _near_mean(rows: Array, key: Array, count: int) -> Array:
    """Draws from N(mean, 1e-9 times the covariance) of the rows, without making the covariance."""
    mean = jnp.mean(rows, axis=0)
    weights = jax.random.normal(key, (count, rows.shape[0])) * (_SPREAD / rows.shape[0]) ** 0.5
    return mean + weights @ (rows - mean)
