"""The same maths as one file of plain JAX, as a careful person writes it in an afternoon.

Layers stacked and scanned, `jax.nn.dot_product_attention`, whole logits with `jax.nn.log_softmax`,
`optax.adamw`, everything under one `jax.jit` with donated state. No trainer around it: no metrics,
no data pipeline, no guard against non-finite gradients.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

BETA = 0.1
EPS = 1e-6


def load(model: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json, and the weights with layers stacked."""
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    files = load_file(model / "model.safetensors")

    def stack(name: str, *, transpose: bool = True) -> jax.Array:
        leaves = [files[f"model.layers.{i}.{name}.weight"]
                  for i in range(config["num_hidden_layers"])]  # fmt: skip
        return jnp.asarray(np.stack([x.T if transpose else x for x in leaves]))

    layers = {name: stack(f"self_attn.{name}_proj") for name in "qkvo"}
    layers |= {name: stack(f"mlp.{name}_proj") for name in ("gate", "up", "down")}
    layers["norm1"] = stack("input_layernorm", transpose=False)
    layers["norm2"] = stack("post_attention_layernorm", transpose=False)
    embed, norm = files["model.embed_tokens.weight"], files["model.norm.weight"]
    return config, {"embed": jnp.asarray(embed), "norm": jnp.asarray(norm), "layers": layers}


def rms(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS) * scale


def rotate(x: jax.Array, theta: float) -> jax.Array:
    s, e = x.shape[1], x.shape[-1]
    angles = jnp.arange(s)[:, None] * theta ** (-jnp.arange(0, e, 2) / e)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def token_logps(
    config: dict[str, Any], dtype: str, params: dict[str, Any], ids: jax.Array
) -> jax.Array:
    """Log-probs of ids[:, 1:], [b s-1]."""
    h, k = config["num_attention_heads"], config["num_key_value_heads"]
    theta = config["rope_parameters"]["rope_theta"]
    b, s = ids.shape

    def dot(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.dot(x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)

    def layer(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        y = rms(x, w["norm1"])
        q, key, value = (dot(y, w[n]).reshape(b, s, m, -1) for n, m in zip("qkv", (h, k, k)))
        q, key = rotate(q, theta), rotate(key, theta)
        q, key, value = (a.astype(dtype) for a in (q, key, value))
        mixed = jax.nn.dot_product_attention(q, key, value, is_causal=True)
        x = x + dot(mixed.reshape(b, s, -1), w["o"])
        y = rms(x, w["norm2"])
        return x + dot(jax.nn.silu(dot(y, w["gate"])) * dot(y, w["up"]), w["down"]), None

    x, _ = jax.lax.scan(layer, params["embed"][ids], params["layers"])
    logits = dot(rms(x, params["norm"])[:, :-1], params["embed"].T)
    logps = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logps, ids[:, 1:, None], axis=-1)[..., 0]


def step(
    task: str,
    model: Path,
    data: list[dict[str, str]],
    *,
    rows: int,
    length: int,
    dtype: str,
    learning_rate: float,
) -> Callable[[], None]:
    """The contender: one optimizer step per call."""
    config, params = load(model)
    logps_of = functools.partial(token_logps, config, dtype)
    tx = optax.adamw(learning_rate, weight_decay=0.0)
    prompt = 0 if task == "sft" else length // 4

    def loss(params: Any, ids: jax.Array, ref: jax.Array) -> jax.Array:
        logps = logps_of(params, ids)
        if task == "sft":
            return -jnp.mean(logps)
        chosen, rejected = jnp.split(logps[:, prompt - 1 :].sum(axis=1) - ref, 2)
        return -jnp.mean(jax.nn.log_sigmoid(BETA * (chosen - rejected)))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: Any, start: Any, ids: jax.Array) -> tuple[Any, jax.Array]:
        params, moments = state
        ref = jnp.zeros(())
        if task == "dpo":
            ref = logps_of(start, ids)[:, prompt - 1 :].sum(axis=1)
        value, gradient = jax.value_and_grad(loss)(params, ids, ref)
        norm = optax.tree.norm(gradient)
        gradient = jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / (norm + 1e-6)), gradient)
        change, moments = tx.update(gradient, moments, params)
        return (optax.apply_updates(params, change), moments), value

    ids = np.asarray(list(_encoded(task, data)), np.int32)
    batches = itertools.cycle(ids[i : i + rows] for i in range(0, len(ids), rows))
    start = jax.tree.map(jnp.copy, params) if task == "dpo" else None
    state = (params, tx.init(params))

    def run() -> None:
        nonlocal state
        batch = next(batches)
        state, _ = update(state, start, jnp.asarray(batch.swapaxes(0, 1).reshape(-1, length)))
        jax.block_until_ready(state)

    begun = time.perf_counter()
    run()
    run.first_step = time.perf_counter() - begun  # type: ignore[attr-defined]
    return run


def _encoded(task: str, data: list[dict[str, str]]) -> Any:
    """Token ids of the texts, [1 s] or [2 s] per example, with the EOS."""

    def ids(text: str) -> list[int]:
        return [*(int(word[1:]) for word in text.split()), 1]

    for row in data:
        if task == "sft":
            yield [ids(row["text"])]
        else:
            yield [ids(row["prompt"] + row[side]) for side in ("chosen", "rejected")]
