"""A tiny model, its loss and a source of batches; also a program that trains and can be killed."""

from __future__ import annotations

import functools
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jrlhf.config import TrainingConfig
from jrlhf.models.axes import constrain
from jrlhf.sharding.distributed import initialize
from jrlhf.sharding.mesh import make_mesh
from jrlhf.sharding.place import axes_shardings, put_batch
from jrlhf.train.loop import Loop
from jrlhf.train.optim import make_optimizer
from jrlhf.train.state import new_state, state_shardings
from jrlhf.train.step import make_step
from jrlhf.types import Loss, Max, Mean, Min

WIDTH, HIDDEN, LENGTH = 8, 16, 5
AXES = {
    "layers": {
        "up": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")},
        "down": {"kernel": ("layers", "mlp", "embed")},
        "norm": {"scale": ("layers", None)},
    },
    "head": {"kernel": ("embed", None)},
}


def params(seed=0):
    random = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(0.3 * random.normal(size=shape), jnp.float32)

    return {
        "layers": {
            "up": {"kernel": draw(2, WIDTH, HIDDEN), "bias": draw(2, HIDDEN)},
            "down": {"kernel": draw(2, HIDDEN, WIDTH)},
            "norm": {"scale": draw(2, WIDTH)},
        },
        "head": {"kernel": draw(WIDTH, 1)},
    }


def predict(params, x):
    def layer(x, p):
        x = x * p["norm"]["scale"]
        h = constrain(jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"]), ("batch", None, "mlp"))
        return constrain(x + h @ p["down"]["kernel"], ("batch", "sequence", None)), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return (x @ params["head"]["kernel"])[..., 0]


def loss(params, frozen, batch):
    error = (predict(params, batch["x"]) - batch["y"]) ** 2 * batch["mask"]
    weight = jnp.sum(batch["mask"])
    return Loss(
        Mean(jnp.sum(error), weight),
        {
            "error": Mean(jnp.sum(jnp.sqrt(error)), weight),
            "error/max": Max(jnp.max(error)),
            "error/min": Min(jnp.min(jnp.where(batch["mask"] > 0, error, jnp.inf))),
        },
    )


def batch(step=0, rows=16, seed=0):
    """Rows of very different lengths, so that a mean of means is far from the mean."""
    draw = np.random.default_rng([seed, step])
    lengths = draw.integers(1, LENGTH + 1, rows).astype(np.int32)
    return {
        "x": draw.normal(size=(rows, LENGTH, WIDTH)).astype(np.float32),
        "y": draw.normal(size=(rows, LENGTH)).astype(np.float32),
        "mask": (np.arange(LENGTH) < lengths[:, None]).astype(np.float32),
        "lengths": lengths,
    }


def recorder():
    """An optimizer that moves nothing and keeps the gradient as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, gradient), gradient),
    )


class Buffered:
    """Draws a buffer of three batches at a time, like a policy that collects rollouts.

    What it draws depends on what it drew before, so a resume must restore it.
    """

    def __init__(self, mesh, *, rows=16, delay=0.0, spoil=()):
        self.mesh, self.rows, self.delay, self.spoil = mesh, rows, delay, spoil
        self.start, self.buffer, self.drawn, self.seen = -1, None, 0, []

    def batch(self, step, state):
        time.sleep(self.delay)
        if step // 3 * 3 != self.start:
            self.start = step // 3 * 3
            rows = [batch(self.start + i, self.rows, seed=self.drawn) for i in range(3)]
            self.drawn += 1
            self.buffer = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
        self.seen.append(step)
        out = {k: v[step - self.start] for k, v in self.buffer.items()}
        if step in self.spoil:
            out = {**out, "y": out["y"] * np.float32(self.spoil[step])}
        share = self.rows // jax.process_count()
        mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        return put_batch(self.mesh, {k: v[mine] for k, v in out.items()})

    def metrics(self):
        return {"position": float(self.seen[-1])}

    def state_dict(self):
        return {"start": self.start, "buffer": self.buffer, "drawn": self.drawn}

    def load_state_dict(self, saved):
        self.start, self.buffer, self.drawn = saved["start"], saved["buffer"], saved["drawn"]

    def watch(self, tell):
        self.tell = tell


@functools.cache
def machine(optim, rate, decay, accumulate, limit, mesh, steps):
    """What is compiled, once for all tests that want the same."""
    config = TrainingConfig(optim=optim, learning_rate=rate, weight_decay=decay)
    mesh = make_mesh(mesh, devices=jax.devices()[:1] if mesh == "data=1" else None)
    first = params()
    tx, schedule = make_optimizer(config, steps, axes=AXES)
    placed = axes_shardings(AXES, first, mesh)
    shardings = state_shardings(tx, first, placed)
    state = new_state(jax.device_put(first, placed), tx, shardings=shardings)
    step = make_step(
        loss,
        tx,
        accumulate=accumulate,
        max_grad_norm=limit,
        mesh=mesh,
        shardings=shardings,
        schedule=schedule,
    )
    return mesh, tx, state, step


def setup(config, *, mesh="data=1", steps=6, source=None, **loop):
    """Everything that a trainer makes: mesh, state, step and loop."""
    mesh, tx, state, step = machine(
        config.optim,
        config.learning_rate,
        config.weight_decay,
        config.gradient_accumulation_steps,
        config.max_grad_norm,
        mesh,
        steps,
    )
    source = source(mesh) if source else Buffered(mesh)
    run = Loop(args=config, step=step, source=source, total_steps=steps, **loop)
    state = jax.tree.map(jnp.copy, state)
    return SimpleNamespace(mesh=mesh, tx=tx, state=state, step=step, loop=run, source=source)


if __name__ == "__main__":
    initialize()
    config = TrainingConfig(
        output_dir=sys.argv[1],
        logging_steps=1,
        save_steps=1000,
        resume_from_checkpoint=True if "resume" in sys.argv else None,
    )
    total = int(sys.argv[2])
    toy = setup(
        config, mesh=sys.argv[3], steps=total, source=lambda mesh: Buffered(mesh, delay=0.02)
    )
    _, output = toy.loop.run(toy.state, {})
    sys.stdout.write(f"finished {output.global_step}\n")
