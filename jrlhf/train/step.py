"""The one step: the only place that takes a gradient, and the only line that divides."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from jrlhf.ops.layout import jit
from jrlhf.sharding.mesh import check_batch
from jrlhf.sharding.place import batch_sharding, replicated
from jrlhf.sharding.rules import DEFAULT, Rules, activate
from jrlhf.train.adam import choose
from jrlhf.train.state import TrainState
from jrlhf.types import Batch, Loss, Max, Mean, Metric, Min, PyTree, Routing

LossFn = Callable[[PyTree, PyTree, Batch], Loss]
Step = Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict[str, Array]]]


def make_step(
    loss: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT,
    shardings: TrainState | None = None,
    schedule: optax.Schedule | None = None,
    dropout: int | None = None,
    donate: bool = True,
) -> Step:
    """Compiles (on first use) state, frozen, batch -> state, metrics.

    The gradient is that of sum(totals) / sum(weights) over the whole batch, so it does not depend
    on how the batch is cut into micro-batches or over devices; nor does that of a router's load
    balance (`_count`). Where it is not finite, or the weights are all 0, the update is left out:
    params and optimizer state stay the same bits, `skipped` counts one more, the schedule waits.

    Args:
        loss: of (trainable params, frozen params, batch); totals and weights, nothing divided.
        tx: the optimizer.
        accumulate: micro-batches per update; number i holds the rows i::accumulate, which every
            data shard has locally. Scalars in a batch go to each of them.
        max_grad_norm: clips the global norm as torch's `clip_grad_norm_` does; None or 0: off.
        mesh: the mesh for `models.axes.constrain`; None: one device.
        rules: logical to mesh axes.
        shardings: of the state, so that it leaves as it came; needs `mesh`.
        schedule: adds the metric `learning_rate`, the rate that this update used.
        dropout: a seed gives the batch `dropout` [b 2], the raw data of one key per row, a function
            of (seed, step, row): the same under any split. None: nothing is dropped.
        donate: the given state's buffers are reused, and it cannot be used again.

    Returns:
        A function whose metrics are float32 scalars: `loss`, those of the loss, `grad_norm` (before
        the clip), `skipped_steps` (so far) and, where the batch has `lengths`, `num_tokens` in it.
    """

    def step(
        state: TrainState, frozen: PyTree, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        if mesh is not None:
            check_batch(count_rows(batch), mesh, accumulate=accumulate)
        if dropout is not None:
            batch = {**batch, "dropout": _dropout_keys(dropout, state.step, count_rows(batch))}
        with activate(mesh, rules):
            micro = _split(batch, accumulate, mesh)
            gradient, sums = _accumulate(loss, state.params, frozen, micro)
            new, norm = _update(tx, state, gradient, sums.objective, max_grad_norm)
        metrics = {"loss": sums.value(), **_values(sums.metrics)}
        metrics |= {"grad_norm": norm, "skipped_steps": new.skipped}
        if schedule is not None:
            metrics["learning_rate"] = schedule(state.step - state.skipped)
        if "lengths" in batch:
            metrics["num_tokens"] = jnp.sum(batch["lengths"])
        return new, {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}

    out = None if shardings is None or mesh is None else (shardings, replicated(mesh))
    return jit(step, mesh=mesh, donate_argnums=(0,) if donate else (), out_shardings=out)


def _dropout_keys(seed: int, step: Int[Array, ""], rows: int) -> UInt32[Array, "b 2"]:
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), zlib.crc32(b"dropout"))
    own = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), jnp.arange(rows))
    return jax.random.key_data(own)


def _update(
    tx: optax.GradientTransformation,
    state: TrainState,
    gradient: PyTree,
    objective: Mean,
    max_grad_norm: float | None,
) -> tuple[TrainState, Float[Array, ""]]:
    """The state after one update with sum(gradients) / sum(weights), and that gradient's norm."""
    weight = jnp.where(objective.weight == 0, 1.0, objective.weight)
    gradient = jax.tree.map(lambda g: g / weight, gradient)
    norm = optax.tree.norm(gradient)
    good = jnp.isfinite(norm) & jnp.isfinite(objective.total) & (objective.weight > 0)
    clipped = _clip(gradient, norm, max_grad_norm)
    advance = optax.with_extra_args_support(tx).update
    updates, moved = advance(clipped, state.opt_state, state.params, good=good)
    new = TrainState(
        state.step + 1,
        state.skipped + (~good).astype(jnp.int32),
        choose(good, optax.apply_updates(state.params, updates), state.params),
        choose(good, moved, state.opt_state),
    )
    return new, norm


def make_evaluation(
    loss: LossFn, *, mesh: Mesh | None = None, rules: Rules = DEFAULT
) -> Callable[[PyTree, PyTree, Iterable[Batch]], dict[str, float]]:
    """Means over a whole evaluation set, divided once at the end.

    Returns:
        A function of (trainable params, frozen params, batches) that gives `loss` and the loss's
        metrics as floats. Batches may be of different shapes; each shape compiles once.
    """

    @functools.partial(jit, mesh=mesh)
    def sums(params: PyTree, frozen: PyTree, batch: Batch) -> Loss:
        with activate(mesh, rules):
            return loss(params, frozen, batch)

    merge = jax.jit(_merge)

    def evaluate(params: PyTree, frozen: PyTree, batches: Iterable[Batch]) -> dict[str, float]:
        total: Loss | None = None
        for batch in batches:
            one = sums(params, frozen, batch)
            total = one if total is None else merge(total, one)
        if total is None:
            return {}
        values = {"loss": total.value(), **_values(total.metrics)}
        return {name: float(x) for name, x in jax.device_get(values).items()}

    return evaluate


def _accumulate(
    loss: LossFn, params: PyTree, frozen: PyTree, micro: list[Batch] | Batch
) -> tuple[PyTree, Loss]:
    """Sums of gradients, totals and weights over the micro-batches."""

    def total(params: PyTree, batch: Batch, whole: Loss | None) -> tuple[Float[Array, ""], Loss]:
        out = loss(params, frozen, batch)
        return _share(out, out if whole is None else whole), out

    differentiate = jax.grad(total, has_aux=True)
    if isinstance(micro, list):
        return differentiate(params, micro[0], None)

    first = jax.tree.map(lambda x: x[0], micro)
    nothing = _nothing(jax.eval_shape(loss, params, frozen, first))
    whole = None
    if nothing.balance is not None:
        whole = _count(loss, params, frozen, micro, nothing._replace(metrics={}))

    def body(sums: tuple[PyTree, Loss], batch: Batch) -> tuple[tuple[PyTree, Loss], None]:
        gradient, out = differentiate(params, batch, whole)
        return (jax.tree.map(jnp.add, sums[0], gradient), _merge(sums[1], out)), None

    start = (jax.tree.map(jnp.zeros_like, params), nothing)
    return jax.lax.scan(body, start, micro)[0]


def _share(out: Loss, whole: Loss) -> Float[Array, ""]:
    """What a micro-batch adds to the total that the whole batch's weight will divide."""
    if out.balance is None or whole.balance is None:
        return out.objective.total
    weight = jax.lax.stop_gradient(whole.objective.weight)
    return out.objective.total + weight * out.balance.share(whole.balance)


def _count(loss: LossFn, params: PyTree, frozen: PyTree, micro: Batch, nothing: Loss) -> Loss:
    """The whole batch's weight and routing, by a forward pass. All else in it is dead code.

    A router's load balance is a product of two means over the whole batch: the gradient of each
    micro-batch's part needs the visits of all.
    """

    def body(sums: Loss, batch: Batch) -> tuple[Loss, None]:
        out = loss(params, frozen, batch)
        kept = Loss(out.objective._replace(total=jnp.zeros_like(sums.objective.total)), {},
                    out.balance)  # fmt: skip
        return _merge(sums, kept), None

    return jax.lax.scan(body, nothing, micro)[0]


def _split(batch: Batch, accumulate: int, mesh: Mesh | None) -> list[Batch] | Batch:
    """[b ...] -> [a, b/a ...] with the rows i::a in micro-batch i; a list of one without cutting.

    The strided choice keeps every row on its device: shard k of a micro-batch is taken from shard k
    of the batch.
    """
    if accumulate == 1:
        return [batch]

    def one(x: Array) -> Array:
        if x.ndim == 0:
            return jnp.broadcast_to(x, (accumulate,))
        x = jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0)
        if mesh is None or mesh.size == 1:
            return x
        layout = PartitionSpec(None, *batch_sharding(mesh).spec)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, layout))

    return jax.tree.map(one, dict(batch))


def count_rows(batch: Batch) -> int:
    """Examples in a batch: the leading axis of any entry that is not a scalar."""
    return next(x.shape[0] for x in jax.tree.leaves(dict(batch)) if x.ndim)


def _merge(one: Loss, other: Loss) -> Loss:
    # Both come from one function, so a name has the same kind in both.
    metrics = {k: m.merge(other.metrics[k]) for k, m in one.metrics.items()}  # type: ignore[arg-type]
    balance = one.balance
    if balance is not None and other.balance is not None:
        balance = balance.merge(other.balance)
    return Loss(one.objective.merge(other.objective), metrics, balance)


def _nothing(shape: Loss) -> Loss:
    """The neutral element of `_merge`, with the metrics of `shape`."""
    start = {Mean: 0.0, Routing: 0.0, Max: -jnp.inf, Min: jnp.inf}

    def neutral(metric: Metric) -> Metric:
        kind = type(metric)
        return kind(*(jnp.full(x.shape, start[kind], x.dtype) for x in metric))

    metrics = {name: neutral(metric) for name, metric in shape.metrics.items()}
    balance = None if shape.balance is None else neutral(shape.balance)
    return Loss(neutral(shape.objective), metrics, balance)  # type: ignore[arg-type]


def _values(metrics: dict[str, Metric]) -> dict[str, Array]:
    return {name: metric.value() for name, metric in metrics.items()}


def _clip(gradient: PyTree, norm: Float[Array, ""], limit: float | None) -> PyTree:
    if not limit:
        return gradient
    scale = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale, gradient)
