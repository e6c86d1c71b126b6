"""The few types that every layer shares: sums with weights, losses, model outputs.

A loss never divides (contract 1). It returns totals and weights, which merge by addition over
micro-batches and devices; the one division is in `train/step.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Batch = Mapping[str, Any]
PyTree = Any


class Mean(NamedTuple):
    """A mean that has not been taken yet: `total / weight`, both float32 scalars."""

    total: Array
    weight: Array

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> Array:
        """The mean; 0 where nothing was counted, so that an all-padding batch is harmless."""
        safe = jnp.where(self.weight == 0, 1.0, self.weight)
        return jnp.where(self.weight == 0, 0.0, self.total / safe)


class Max(NamedTuple):
    """A maximum over the batch. Start value for "nothing seen": -inf."""

    largest: Array

    def merge(self, other: Max) -> Max:
        return Max(jnp.maximum(self.largest, other.largest))

    def value(self) -> Array:
        return self.largest


class Min(NamedTuple):
    """A minimum over the batch. Start value for "nothing seen": +inf."""

    smallest: Array

    def merge(self, other: Min) -> Min:
        return Min(jnp.minimum(self.smallest, other.smallest))

    def value(self) -> Array:
        return self.smallest


class Routing(NamedTuple):
    """Where tokens went among a model's experts, as sums over (token, layer) pairs.

    What is wanted of it is the load-balancing loss, x · Σ (counts / weight)(probs / weight): a
    product of two means, so no sum of what it is in parts of a batch. The sums are what merges.

    Attributes:
        counts: pairs that visited each expert [x]; they have no gradient.
        probs: the router's probability of each expert, summed over the same pairs [x].
        weight: how many pairs there were.
    """

    counts: Array
    probs: Array
    weight: Array

    def merge(self, other: Routing) -> Routing:
        return Routing(*(a + b for a, b in zip(self, other, strict=True)))

    def value(self) -> Array:
        """The load-balancing loss; even routing gives k, experts per token, the least there is."""
        return self.share(self)

    def share(self, whole: Routing) -> Array:
        """What this part adds to the load-balancing loss of the whole that it is a part of.

        The shares of all parts add up to the whole's value, and so do their gradients.
        """
        weight = jnp.maximum(whole.weight, 1.0)
        visits = jax.lax.stop_gradient(whole.counts) / weight
        return visits.shape[0] * jnp.sum(visits * (self.probs / weight))


Metric = Mean | Max | Min | Routing


class Loss(NamedTuple):
    """What a loss returns: the objective to minimise and what to log, nothing divided.

    Attributes:
        objective: the algorithm's.
        metrics: to be logged.
        balance: of a model whose router shall be balanced: its load-balancing loss is added to the
            objective's mean. Its probabilities are scaled by the coefficient.
    """

    objective: Mean
    metrics: dict[str, Metric]
    balance: Routing | None = None

    def value(self) -> Array:
        """The loss itself."""
        mean = self.objective.value()
        return mean if self.balance is None else mean + self.balance.value()


class Outputs(NamedTuple):
    """What a model says about the tokens of a batch: the only argument with a gradient.

    Every per-token array is aligned with the token that it speaks of: `logps[..., t]` is the
    log-probability of scored token `t` given everything before it, `values[..., t]` the value of
    the state from which it is emitted. Padding holds exact zeros.

    Attributes:
        logps: log-prob of the taken token in nats, float32 [... n]; None for classifiers.
        entropy: entropy of the distribution it was taken from, nats, float32 [... n] or None.
        correct: 1.0 where the token is the most probable one, float32 [... n] or None.
        values: value estimates, float32 [... n] or None.
        scores: classifier score of the whole row, float32 [...] or None.
        routing: where the real tokens went among the experts, or None.
    """

    logps: Array | None = None
    entropy: Array | None = None
    correct: Array | None = None
    values: Array | None = None
    scores: Array | None = None
    routing: Routing | None = None
