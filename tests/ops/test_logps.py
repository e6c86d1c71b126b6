from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jrlhf.ops import logps as module
from jrlhf.ops.logps import head_logits, token_logps

T, D, V = 13, 5, 23


def arrays(rng, t=T, d=D, v=V, vocab=None, scale=1.0):
    hidden = jnp.array(rng.normal(size=(t, d)) * scale, jnp.float32)
    head = jnp.array(rng.normal(size=(d, v)), jnp.float32)
    return hidden, head, jnp.array(rng.integers(0, vocab or v, t), jnp.int32)


def oracle(hidden, head, targets, *, temperature=1.0, softcap=None, vocab=None):
    """The definition in float64 NumPy: log-probs, entropies, top-1 flags."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    logits = logits[:, :vocab] / temperature
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.arange(len(targets))
    return (
        log_p[rows, targets],
        -(np.exp(log_p) * log_p).sum(axis=1),
        (log_p.argmax(axis=1) == np.asarray(targets)).astype(np.float32),
    )


SETTINGS = [
    {},
    {"temperature": 0.7},
    {"softcap": 2.0},
    {"vocab": 17},
    {"temperature": 1.3, "softcap": 3.0, "vocab": 17},
]


CHUNKED = [*((setting, 4) for setting in SETTINGS), ({}, None)]


@pytest.mark.parametrize(("setting", "chunk"), [*CHUNKED, ({}, 1)])
def test_numbers_are_the_definition_for_any_chunk(rng, setting, chunk):
    inputs = arrays(rng, vocab=setting.get("vocab"))
    found = jax.jit(functools.partial(token_logps, chunk=chunk, **setting))(*inputs)
    for name, a, b in zip(("logps", "entropy", "correct"), found, oracle(*inputs, **setting)):
        assert (a.shape, a.dtype) == ((T,), jnp.float32)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6, err_msg=name)


def central_differences(f, x, step=1e-6):
    """∂f/∂x of a float64 function of one array."""
    x = np.array(x, np.float64)
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        high, low = x.copy(), x.copy()
        high[i] += step
        low[i] -= step
        gradient[i] = (f(high) - f(low)) / (2 * step)
    return gradient


@pytest.mark.parametrize(("setting", "chunk"), CHUNKED)
def test_gradients_are_the_derivatives_of_the_definition(rng, setting, chunk):
    hidden, head, targets = arrays(rng, vocab=setting.get("vocab"))
    a, c = rng.normal(size=(2, T))

    def loss(hidden, head):
        logps, entropy, correct = token_logps(hidden, head, targets, chunk=chunk, **setting)
        weights = [jnp.array(w, jnp.float32) for w in (a, c)]
        return jnp.sum(weights[0] * logps + weights[1] * entropy + correct)

    def reference(hidden, head):
        logps, entropy, _ = oracle(hidden, head, targets, **setting)
        return np.sum(a * logps + c * entropy)

    by_hidden, by_head = jax.jit(jax.grad(loss, (0, 1)))(hidden, head)
    expected = central_differences(lambda x: reference(x, head), hidden)
    np.testing.assert_allclose(by_hidden, expected, rtol=1e-4, atol=1e-5)
    expected = central_differences(lambda x: reference(hidden, x), head)
    np.testing.assert_allclose(by_head, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output", [0, 1, 2])
@pytest.mark.parametrize("argument", [0, 1])
def test_one_output_by_one_argument_has_its_gradient(rng, output, argument):
    """Each takes a path of its own, because only what is asked for is computed."""
    *inputs, targets = arrays(rng)

    def only(f, x):
        return f(*[x if i == argument else other for i, other in enumerate(inputs)], targets)

    ours = functools.partial(token_logps, chunk=4)
    found = jax.jit(jax.grad(lambda x: only(ours, x)[output].sum()))(inputs[argument])
    expected = central_differences(lambda x: only(oracle, x)[output].sum(), inputs[argument])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_without_entropy_everything_else_is_the_same(rng):
    inputs = arrays(rng)
    with_it = token_logps(*inputs, chunk=4)
    without = token_logps(*inputs, chunk=4, entropy=False)
    np.testing.assert_array_equal(with_it[0], without[0])
    np.testing.assert_array_equal(with_it[2], without[2])
    np.testing.assert_array_equal(without[1], 0.0)
    gradient = jax.grad(lambda h: token_logps(h, *inputs[1:], entropy=False)[1].sum())(inputs[0])
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[-1]])
def test_a_tied_head_is_the_same_head(rng, setting, chunk, dtype):
    hidden, head, targets = arrays(rng, vocab=setting.get("vocab"))
    head = head.astype(dtype)

    def results(tied):
        def total(hidden, head):
            out = token_logps(hidden, head, targets, chunk=chunk, tied=tied, **setting)
            weights = (1 + targets).astype(jnp.float32)
            return jnp.sum(out[0] * weights + jnp.sin(out[1])), out

        grads, out = jax.jit(jax.grad(total, (0, 1), has_aux=True))(hidden, head)
        logits = jax.jit(functools.partial(head_logits, tied=tied, **setting))(hidden, head)
        return [np.asarray(x, np.float32) for x in (*grads, *out, logits)]

    near = 1e-6 if dtype == jnp.float32 else 1e-2  # one step of bfloat16 is 8e-3
    for found, wanted in zip(results(True), results(False), strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=near, atol=near * np.abs(wanted).max())


def test_of_equal_logits_the_first_is_the_top_one():
    targets = jnp.array([0, 1, 2])
    *_, correct = token_logps(jnp.zeros((3, 2)), jnp.ones((2, 4)), targets)
    np.testing.assert_array_equal(correct, [1.0, 0.0, 0.0])


def test_a_uniform_distribution_has_log_v_nats_and_a_sure_one_none():
    logps, entropy, _ = token_logps(jnp.zeros((1, 2)), jnp.ones((2, V)), jnp.zeros(1, jnp.int32))
    np.testing.assert_allclose([logps[0], entropy[0]], [-np.log(V), np.log(V)], rtol=1e-6)
    head = jnp.zeros((2, V)).at[:, 3].set(100.0)
    logps, entropy, correct = token_logps(jnp.ones((1, 2)), head, jnp.array([3]))
    np.testing.assert_array_equal([logps[0], entropy[0], correct[0]], [0.0, 0.0, 1.0])


def test_huge_logits_stay_finite_forwards_and_backwards(rng):
    hidden, head, targets = arrays(rng, scale=1e4)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda h: sum(x.sum() for x in token_logps(h, head, targets, chunk=4)))
    )(hidden)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_padded_columns_of_the_head_have_no_probability_and_no_gradient(rng):
    hidden, head, targets = arrays(rng, vocab=17)
    for junk in (0.0, 1e3):
        padded = head.at[:, 17:].set(junk)
        f = functools.partial(token_logps, chunk=4, vocab=17)
        logps, entropy, _ = jax.jit(f)(hidden, padded, targets)
        expected = oracle(hidden, head[:, :17], targets)
        np.testing.assert_allclose(logps, expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(entropy, expected[1], rtol=1e-5, atol=1e-6)
        loss = jax.jit(jax.grad(lambda w, f=f: sum(x.sum() for x in f(hidden, w, targets))))
        gradient = loss(padded)
        np.testing.assert_array_equal(gradient[:, 17:], 0.0)


def test_bfloat16_weights_give_float32_results_close_to_exact(rng):
    """Products of bf16 numbers are exact in float32, so only the inputs' rounding is allowed."""
    hidden, head, targets = arrays(rng, d=64)
    hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    found = token_logps(hidden, head, targets, chunk=4)
    for a, b in zip(found, oracle(hidden, head, targets)):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    gradients = jax.jit(jax.grad(lambda h, w: token_logps(h, w, targets, chunk=4)[0].sum(), (0, 1)))
    exact = gradients(hidden.astype(jnp.float32), head.astype(jnp.float32))
    for a, b in zip(gradients(hidden, head), exact):
        assert a.dtype == jnp.bfloat16
        assert np.abs(np.asarray(a, np.float32) - b).max() < 0.02 * np.abs(b).max()


def test_float32_states_meet_bfloat16_weights_at_the_weights_dtype(rng):
    hidden, head, targets = arrays(rng)
    head = head.astype(jnp.bfloat16)
    rounded = hidden.astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        token_logps(hidden, head, targets)[0], token_logps(rounded, head, targets)[0]
    )
    gradient = jax.grad(lambda h: token_logps(h, head, targets)[0].sum())(hidden)
    assert gradient.dtype == jnp.float32


def test_sampler_and_scorer_share_the_logits(rng):
    hidden, head, targets = arrays(rng)
    logits = head_logits(hidden, head, temperature=0.7, softcap=2.0)
    expected = jax.nn.log_softmax(logits)[jnp.arange(T), targets]
    found = token_logps(hidden, head, targets, temperature=0.7, softcap=2.0, chunk=4)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def step(entropy, arguments, hidden, head, targets):
    def loss(hidden, head):
        logps, spread, _ = token_logps(hidden, head, targets, chunk=64, entropy=entropy)
        return logps.sum() + spread.sum()

    return jax.value_and_grad(loss, arguments)(hidden, head)


def compiled(arguments, entropy=True, t=512, d=8, v=1024):
    shapes = (
        jax.ShapeDtypeStruct((t, d), jnp.float32),
        jax.ShapeDtypeStruct((d, v), jnp.float32),
        jax.ShapeDtypeStruct((t,), jnp.int32),
    )
    return jax.jit(functools.partial(step, entropy, arguments)).lower(*shapes).compile()


def test_no_buffer_of_tokens_times_vocabulary_exists_forwards_or_backwards():
    """512 tokens, 1024 words, chunks of 64: the whole array would be 2 MiB, a chunk is 256 KiB."""
    program = compiled((0, 1))
    assert program.memory_analysis().temp_size_in_bytes < 4 * 64 * 1024 * 4
    sizes = [
        np.prod([int(n) for n in shape.split(",")])
        for shape in re.findall(r"f32\[([\d,]+)\]", program.as_text())
    ]
    assert 64 * 1024 in sizes  # the text does show the logits of a chunk
    assert max(sizes) < 512 * 1024


def matmul_flops(program) -> int:
    """Flops of the dots and matmul calls, each counted once (loop bodies are not multiplied)."""
    return program.cost_analysis()["flops"]


def test_a_frozen_head_costs_no_gradient_matmul():
    """The backward chunk then has two matmuls (logits, states) and not three."""
    both, states, head = (matmul_flops(compiled(a)) for a in ((0, 1), 0, 1))
    matmul = 2 * 64 * 8 * 1024
    assert both - states >= 0.9 * matmul
    assert both - head >= 0.9 * matmul


def test_a_mesh_of_eight_devices_gives_the_same_numbers(rng):
    """Rows over data, vocabulary over tensor: t[(data)], w[d, v(tensor)]."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    hidden, head, targets = arrays(rng, t=64, v=24)

    def f(hidden, head, targets):
        def loss(hidden, head):
            found = token_logps(hidden, head, targets, chunk=16)
            return found[0].sum() + found[1].sum(), found

        return jax.grad(loss, (0, 1), has_aux=True)(hidden, head)

    specs = (PartitionSpec("data"), PartitionSpec(None, "tensor"), PartitionSpec("data"))
    placed = [
        jax.device_put(x, NamedSharding(mesh, s))
        for x, s in zip((hidden, head, targets), specs, strict=True)
    ]
    for a, b in zip(
        jax.tree.leaves(jax.jit(f)(*placed)), jax.tree.leaves(jax.jit(f)(hidden, head, targets))
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_it_works_inside_scan_checkpoint_and_vmap_of_gradients(rng):
    hidden, head, targets = arrays(rng, t=12)

    @jax.checkpoint
    def loss(hidden, head, targets):
        logps, entropy, _ = token_logps(hidden, head, targets, chunk=4)
        return jnp.sum(logps + 0.1 * entropy)

    def accumulate(total, micro):
        gradient = jax.grad(loss, (0, 1))(micro[0], head, micro[1])
        return total + gradient[1], gradient[0]

    micros = (hidden.reshape(3, 4, D), targets.reshape(3, 4))
    by_head, by_hidden = jax.lax.scan(accumulate, jnp.zeros_like(head), micros)
    whole = jax.jit(jax.grad(loss, (0, 1)))(hidden, head, targets)
    np.testing.assert_allclose(by_head, whole[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_hidden.reshape(12, D), whole[0], rtol=1e-5, atol=1e-5)
    batched = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (0, None, 0)))(micros[0], head, micros[1])
    np.testing.assert_allclose(batched[1].sum(0), whole[1], rtol=1e-5, atol=1e-5)


@given(tokens=st.integers(1, 5000), chunk=st.integers(1, 5000))
def test_chunks_hold_no_more_rows_than_asked_and_little_padding(tokens, chunk):
    chunks = module._count_chunks(tokens, chunk)
    rows = -(-tokens // chunks)
    assert rows <= chunk
    assert chunks <= max(1, 2 * -(-tokens // chunk))
    assert rows * chunks - tokens < chunks


@pytest.mark.parametrize(("tokens", "chunks"), [(12, 4), (13, 4), (3, 7), (5, 1)])
def test_splitting_into_chunks_and_joining_them_is_the_identity(tokens, chunks):
    x = jnp.arange(2.0 * tokens).reshape(tokens, 2)
    parts = module._split(x, chunks)
    assert parts.shape[0] == chunks
    np.testing.assert_array_equal(module._join(parts, tokens), x)
