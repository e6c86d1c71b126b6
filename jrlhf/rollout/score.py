"""What a model says about finished sequences: the only source of log-probs, values and scores.

Training, the old policy, the reference policy and the reward model all call `outputs`, so they
agree to rounding. They cannot agree to the last bit everywhere: a compiler fuses a forward pass
that has a backward pass otherwise than one that has none (measured on CPU: up to 1e-6, depending on
sizes and flags). `Actor.loss` is therefore told where the policy *is* the old policy, and the ratio
of a rollout's first update is exactly 1 on every platform.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jrlhf.models.build import Net, combine
from jrlhf.models.build_encoder import AnyNet, EncoderNet
from jrlhf.ops.logps import token_logps
from jrlhf.types import Batch, Loss, Outputs, PyTree, Routing


def outputs(
    net: AnyNet,
    params: PyTree,
    batch: Batch,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    routing: bool = False,
    value_net: Net | None = None,
    value_params: PyTree = None,
) -> Outputs:
    """Scores the tokens (causal heads) or the rows (classifiers) of a right-padded batch.

    Args:
        net: the model; a classifier gives `scores` only.
        params: its parameters.
        batch: `ids [... s]` and `lengths [...]`; for packed rows `segments` and `positions [... s]`
            (segment 0 is padding, a document's first token is not scored); for rollouts
            `slots [... n]`, the positions of the scored tokens in `ids`, 0 where there is none,
            and perhaps `trunk [... s d]`, what `net.trunk` gives for these rows; in a training step
            `dropout [b 2]`. Leading axes (pairs) are flattened into rows and restored.
        temperature: divides the logits, as in the sampler.
        entropy: also returns the entropy of each token's distribution.
        routing: also counts where the real tokens go, in a model with experts.
        value_net, value_params: a separate value model; without it `net`'s own value head speaks.

    Returns:
        Arrays like `slots` (or `ids`), exactly 0 where no token is scored; or scores per row.
    """
    lead, rows = _rows(batch)
    hidden, visits = _routed(net, params, rows, wanted=routing)
    if isinstance(net, EncoderNet) or net.spec.head == "classifier":
        scores = net.scores(params, hidden, rows["lengths"])
        labels = scores.shape[-1:] if scores.shape[-1] > 1 else ()
        return Outputs(scores=scores.reshape(lead + labels))

    real = _scored(rows)
    hidden = _states(hidden, rows)
    logps, spread, correct = token_logps(
        net.head_states(hidden.reshape(-1, hidden.shape[-1])),
        net.head(params),
        _targets(rows).reshape(-1),
        temperature=temperature,
        softcap=net.spec.final_softcap,
        entropy=entropy,
        vocab=net.spec.vocab_size,
        tied=net.spec.tie_word_embeddings,
    )
    values = net.values(params, hidden) if net.spec.value_head and value_net is None else None
    if value_net is not None:
        states = _states(_hidden(value_net, value_params, rows), rows)
        values = value_net.values(value_params, states)

    def shaped(x: Array | None) -> Array | None:
        if x is None:
            return None
        return jnp.where(real, x.reshape(real.shape), 0.0).reshape(lead + real.shape[1:])

    found = Outputs(logps, spread if entropy else None, correct, values)
    return Outputs(*(shaped(x) for x in found[:4]))._replace(routing=visits)  # type: ignore[arg-type]


def _rows(batch: Batch) -> tuple[tuple[int, ...], dict[str, Array]]:
    """The batch's leading axes, and its arrays with these flattened into one."""
    lead = batch["ids"].shape[:-1]
    names = ("ids", "lengths", "segments", "positions", "slots", "trunk")
    given = {name: jnp.asarray(batch[name]) for name in names if name in batch}
    rows = {name: x.reshape(-1, *x.shape[len(lead) :]) for name, x in given.items()}
    if "dropout" in batch:
        rows["dropout"] = _keys_of_members(batch["dropout"], lead)
    return lead, rows


def _keys_of_members(keys: Array, lead: tuple[int, ...]) -> Array:
    """One dropout key per row from one per example: the members of a pair drop independently."""
    count = math.prod(lead[1:])

    def spread(key: Array) -> Array:
        own = jax.random.wrap_key_data(key, impl="threefry2x32")
        members = jax.vmap(jax.random.fold_in, (None, 0))(own, jnp.arange(count))
        return jax.random.key_data(members)

    return jax.vmap(spread)(keys).reshape(-1, 2)


def _hidden(
    net: AnyNet, params: PyTree, rows: dict[str, Array], *, trunk: Array | None = None
) -> Float[Array, "b s d"]:
    # Only decoders take these.
    given = {"trunk": trunk, "dropout": rows.get("dropout")}
    given = {name: x for name, x in given.items() if x is not None}
    return net.hidden(
        params,
        rows["ids"],
        lengths=rows["lengths"],
        segments=rows.get("segments"),
        positions=rows.get("positions"),
        **given,
    )


def _routed(
    net: AnyNet, params: PyTree, rows: dict[str, Array], *, wanted: bool
) -> tuple[Float[Array, "b s d"], Routing | None]:
    """Hidden states, and where the tokens went if that is wanted."""
    if not wanted:
        return _hidden(net, params, rows, trunk=rows.get("trunk")), None
    assert isinstance(net, Net)
    names = ("lengths", "segments", "positions", "trunk", "dropout")
    return net.hidden_and_routing(params, rows["ids"], **{name: rows.get(name) for name in names})


def _targets(rows: dict[str, Array]) -> Int[Array, "b n"]:
    """The tokens to score."""
    ids = rows["ids"]
    return jnp.take_along_axis(ids, rows["slots"], axis=1) if "slots" in rows else ids


def _scored(rows: dict[str, Array]) -> Bool[Array, "b n"]:
    """True where a token is scored: real, and not the first of its document."""
    s = rows["ids"].shape[1]
    slots: Int[Array, "b n"] = rows.get("slots", jnp.arange(s, dtype=jnp.int32)[None, :])
    real = (slots > 0) & (slots < rows["lengths"][:, None])
    if "segments" in rows:
        segments = rows["segments"]
        same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0))) & (segments > 0)
        here = jnp.broadcast_to(slots, (segments.shape[0], slots.shape[1]))
        real = real & jnp.take_along_axis(same, here, axis=1)
    return real


def _states(hidden: Float[Array, "b s d"], rows: dict[str, Array]) -> Float[Array, "b n d"]:
    """The state from which each scored token is emitted: one position before it."""
    if "slots" in rows:
        before = jnp.maximum(rows["slots"] - 1, 0)
        return jnp.take_along_axis(hidden, before[:, :, None], axis=1)
    return jnp.roll(hidden, 1, axis=1)  # position 0 receives garbage, which `_scored` removes


class Algorithm(Protocol):
    """Anything with a loss of outputs and a batch (`jrlhf.algos`)."""

    def loss(self, out: Outputs, batch: Batch) -> Loss: ...


@dataclasses.dataclass(frozen=True)
class Actor:
    """A policy, perhaps with a separate value model, as a function of (trainable, frozen).

    The loss of the training step and the scoring pass of a rollout both call `outputs`. With a
    `value_net` both trees are {"policy": …, "value": …}; else they are the policy's own.
    """

    net: AnyNet
    temperature: float = 1.0
    value_net: Net | None = None

    @property
    def has_values(self) -> bool:
        """Whether `outputs` gives values."""
        return self.value_net is not None or self.net.spec.value_head

    def policy(self, trainable: PyTree, frozen: PyTree) -> PyTree:
        """The policy's complete parameters."""
        if self.value_net is None:
            return combine(trainable, frozen)
        return combine(trainable["policy"], frozen["policy"])

    def outputs(
        self,
        trainable: PyTree,
        frozen: PyTree,
        batch: Batch,
        *,
        entropy: bool = False,
        routing: bool = False,
    ) -> Outputs:
        """`outputs` under the policy's temperature, with values from wherever they come."""
        value: dict[str, Any] = {}
        if self.value_net is not None:
            value = {
                "value_net": self.value_net,
                "value_params": combine(trainable["value"], frozen["value"]),
            }
        params = self.policy(trainable, frozen)
        return outputs(
            self.net,
            params,
            batch,
            temperature=self.temperature,
            entropy=entropy,
            routing=routing,
            **value,
        )

    def loss(
        self,
        algorithm: Algorithm,
        trainable: PyTree,
        frozen: PyTree,
        batch: Batch,
        *,
        entropy: bool = False,
        balance: float = 0.0,
    ) -> Loss:
        """The algorithm's loss of this actor: what the training step differentiates.

        With `balance`, the weight of the router's load-balancing loss, that is in it as well, over
        all real tokens, and in the metrics as `aux_loss` (without the weight).

        Where the batch says `fresh` (a scalar, 1.0 for the first update of a rollout) the
        parameters are those that sampled it, so the log-probs computed here are the old ones.
        """
        out = self.outputs(trainable, frozen, batch, entropy=entropy, routing=balance > 0)
        if "fresh" in batch and "old_logps" in batch and out.logps is not None:
            own = jax.lax.stop_gradient(out.logps)
            old = jnp.where(batch["fresh"] > 0, own, batch["old_logps"])
            batch = {**batch, "old_logps": old}
        loss = algorithm.loss(out, batch)
        if out.routing is None:
            return loss
        scaled = out.routing._replace(probs=balance * out.routing.probs)
        return Loss(loss.objective, {**loss.metrics, "aux_loss": out.routing}, scaled)
