"""Arrays laid out for a CPU's dots: the same numbers, and no dot that is widened."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jrlhf.models.attention import Scoring, attend_causal
from jrlhf.models.layers import dot, weight_gradient
from jrlhf.ops import layout
from jrlhf.ops.logps import token_logps
from jrlhf.sharding.mesh import make_mesh

LOW = jnp.bfloat16


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the CPU's backend")


def test_it_is_the_identity_also_for_gradients_and_on_a_mesh(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)
    np.testing.assert_array_equal(jax.jit(lambda x: layout.written(x.T))(x), x.T)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(layout.written(x.T) ** 3)))(x)
    np.testing.assert_allclose(gradient, 3 * x**2, rtol=1e-6)
    mesh = make_mesh("data=4,tensor=2")
    cut = jax.device_put(x, NamedSharding(mesh, P("data", "tensor")))
    np.testing.assert_array_equal(jax.jit(lambda x: layout.written(x.T) * 2)(cut), 2 * x.T)


def test_other_platforms_programs_are_left_alone() -> None:
    x = jnp.ones((2, 3))
    assert (
        "layout_constraint" in str(jax.make_jaxpr(layout.written)(x)) or layout.platform() != "cpu"
    )
    with layout.target("tpu"):
        assert layout.platform() == "tpu"
        assert "layout_constraint" not in str(jax.make_jaxpr(lambda x: layout.written(x))(x))


def test_off_a_cpu_rows_are_contracted_without_merging_axes_that_a_mesh_cuts(
    rng: np.random.Generator,
) -> None:
    x, g = (jnp.asarray(rng.normal(size=(2, 3, n)), jnp.float32) for n in (4, 5))
    here = weight_gradient(x, g, 2)
    with layout.target("tpu"):
        assert "reshape" not in str(jax.make_jaxpr(lambda x, g: weight_gradient(x, g, 2))(x, g))
        np.testing.assert_allclose(weight_gradient(x, g, 2), here, rtol=1e-5, atol=1e-6)


def tied_head(hidden: Any, table: Any) -> Any:
    targets = jnp.zeros(hidden.shape[0], jnp.int32)
    return jnp.sum(token_logps(hidden.astype(LOW), table.astype(LOW).T, targets)[0])


def linear(x: Any, w: Any) -> Any:
    return jnp.sum(jnp.tanh(dot(x, w, 1, "bfloat16")))


def attention(q: Any, k: Any) -> Any:
    out = attend_causal(q, k, k, None, None, None, "bfloat16", Scoring())
    return jnp.sum(out.astype(jnp.float32) ** 2)


CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...]]] = {
    "a tied head's log-probs": (tied_head, (256, 64), (512, 64)),
    "a linear map": (linear, (256, 64), (64, 96)),
    "attention": (attention, (2, 128, 4, 16), (2, 128, 2, 16)),
}


@on_cpu
@pytest.mark.parametrize("case", CASES)
def test_no_bfloat16_dot_is_widened(case: str, rng: np.random.Generator) -> None:
    """Forward and backward, as the compiled program has them."""
    function, *shapes = CASES[case]
    arguments = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    step = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
    program = step.lower(*arguments).compile().as_text()
    kinds = dict(re.findall(r"%([\w.\-]+) = (\w+\[[\d,]*\])", program))
    dots = re.findall(r"= (\S+) dot\(%([\w.\-]+), %([\w.\-]+)\)", program)
    assert len(dots) >= 3
    wide = [(result, kinds[a], kinds[b]) for result, a, b in dots
            if (kinds[a] + kinds[b]).count("bf16") != 2]  # fmt: skip
    assert not wide
    jax.block_until_ready(step(*arguments))  # it runs, too: some JAX refuse such dots when running
