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
from jrlhf.models.rope import Rotation, rotate
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


@pytest.mark.parametrize("shape", [(8, 48), (3, 5, 7), (6, 2, 64), (4, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, LOW])
def test_rows_come_last_whether_or_not_they_fill_panels(
    shape: tuple[int, ...], dtype: Any, rng: np.random.Generator
) -> None:
    x = jnp.asarray(rng.normal(size=shape), dtype)
    wanted = np.moveaxis(np.asarray(x), 0, -1)
    np.testing.assert_array_equal(jax.jit(layout.rows_last)(x), wanted)
    with layout.target("tpu"):
        np.testing.assert_array_equal(jax.jit(lambda x: layout.rows_last(x))(x), wanted)


@pytest.mark.parametrize("sizes", [(3, 3), (4, 1), (1, 6)])
def test_joined_is_a_concatenation_to_the_bit(
    sizes: tuple[int, int], rng: np.random.Generator
) -> None:
    first, second = (jnp.asarray(rng.normal(size=(2, 5, n)), jnp.float32) for n in sizes)
    first, second = first.at[0, 0, 0].set(-0.0), second.at[0, 0, -1].set(jnp.nan)
    weight = jnp.asarray(rng.normal(size=(2, 5, sum(sizes))), jnp.float32)

    def pulled(join: Any) -> Any:
        whole, pull = jax.vjp(join, first, second)
        return (whole, *pull(weight))

    wanted = pulled(lambda *both: jnp.concatenate(both, axis=-1))
    for found, right in zip(pulled(layout.joined), wanted, strict=True):
        bits = [np.asarray(x).view(np.int32) for x in (found, right)]
        np.testing.assert_array_equal(*bits)


@on_cpu
def test_a_turn_is_no_concatenation(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(2, 8, 4, 16)), jnp.float32)
    angles = jnp.asarray(rng.normal(size=(1, 8, 8)), jnp.float32)
    for pairs in (8, 4):  # of all 16 channels, of half of them
        r = Rotation(jnp.cos(angles[..., :pairs]), jnp.sin(angles[..., :pairs]))
        program = jax.jit(rotate).lower(x, r).compile().as_text()
        assert "concatenate(" not in program


def test_rows_come_last_on_a_mesh_that_cuts_them(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(8, 6, 16)), jnp.float32)
    cut = jax.device_put(x, NamedSharding(make_mesh("data=4,tensor=2"), P("data", "tensor")))
    np.testing.assert_array_equal(jax.jit(layout.rows_last)(cut), np.moveaxis(x, 0, -1))


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
    return jnp.sum(token_logps(hidden.astype(LOW), table.astype(LOW).T, targets, tied=True)[0])


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


def stacked(x: Any, stack: Any) -> Any:
    """Layers that keep something in bfloat16 for the way back."""

    def layer(x: Any, w: Any) -> tuple[Any, None]:
        return jnp.tanh(dot(x.astype(LOW), w, 1, "bfloat16")), None

    return jnp.sum(jax.lax.scan(layer, x, stack)[0])


@on_cpu
def test_no_stack_of_layers_is_widened_in_front_of_its_loop(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(24, 32)), jnp.float32)
    stack = jnp.asarray(rng.normal(size=(6, 32, 32)), LOW)

    def widened(options: dict[str, str] | None) -> list[str]:
        step = jax.jit(jax.grad(stacked, argnums=(0, 1)), compiler_options=options)
        program = step.lower(x, stack).compile().as_text()
        entry = program[program.index("ENTRY") :]
        return re.findall(r"convert\S* = (f32\[6,\d+,32\])", entry)

    assert not widened(layout.compiler_options())
    if jax.__version_info__ < (0, 11):  # later XLA leaves them alone by itself
        assert set(widened(None)) == {"f32[6,32,32]", "f32[6,24,32]"}


def test_what_is_compiled_so_gives_the_same_and_keeps_its_name() -> None:
    def twice(x: Any, *, times: int = 2) -> Any:
        """Multiplies."""
        return times * x

    call = layout.jit(twice, static_argnames=("times",))
    assert (call(jnp.ones(3), times=3) == 3).all()
    assert (call(jnp.ones(3)) == 2).all()
    assert (call.__name__, call.__doc__) == ("twice", "Multiplies.")


def test_it_may_be_part_of_another_program_and_of_a_gradient() -> None:
    call = layout.jit(lambda x: jnp.sum(x**2))
    x = jnp.arange(3.0)
    for change in (jax.grad, lambda f: jax.jit(jax.grad(f)), lambda f: jax.grad(jax.jit(f))):
        np.testing.assert_array_equal(change(call)(x), 2 * x)
    rows = jnp.stack([x, 2 * x])
    np.testing.assert_array_equal(jax.vmap(call)(rows), jax.lax.map(call, rows))
    assert float(jax.jit(lambda: call(np.ones(3, np.float32)))()) == 3.0  # nothing traced goes in
    assert jax.eval_shape(call, x).shape == ()


@on_cpu
def test_the_users_own_passes_stay_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_x=1 --xla_disable_hlo_passes=fusion,cse --a=b")
    options = layout.compiler_options()
    assert options == {"xla_disable_hlo_passes": f"fusion,cse,{layout.LOOPS}"}
    with layout.target("tpu"):
        assert layout.compiler_options() is None
