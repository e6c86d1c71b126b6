"""Kernels laid out for decoding: the same map, read the other way round."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jrlhf.ops.logps import head_logits
from jrlhf.ops.turned import Turned

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("inputs", "outputs"), [((5,), (7,)), ((2, 3), (7,)), ((5,), (2, 4)), ((2, 3), (4, 2))]
)
@pytest.mark.parametrize("rows", [(3,), (3, 1)])
def test_a_turned_kernel_is_the_same_map(inputs, outputs, rows) -> None:
    kernel = RANDOM.normal(size=inputs + outputs).astype(np.float32)
    x = RANDOM.normal(size=rows + inputs).astype(np.float32)
    turned = Turned.of(jax.numpy.asarray(kernel), len(inputs))
    assert turned.turned.shape == outputs + inputs
    assert turned.shape == kernel.shape
    np.testing.assert_array_equal(turned[...], kernel)
    flat = x.reshape(-1, np.prod(inputs)).astype(np.float64) @ kernel.reshape(np.prod(inputs), -1)
    y = jax.jit(Turned.dot)(turned, x)
    np.testing.assert_allclose(y, flat.reshape(rows + outputs), rtol=1e-5, atol=1e-5)


def test_it_rounds_its_operands_to_its_type_and_gives_float32() -> None:
    kernel = jax.numpy.asarray(RANDOM.normal(size=(32, 8)), "bfloat16")
    x = RANDOM.normal(size=(4, 32)).astype(np.float32)
    y = jax.jit(Turned.dot)(Turned.of(kernel, 1), x)
    rounded = np.asarray(jax.numpy.asarray(x, "bfloat16"), np.float64)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, rounded @ np.asarray(kernel, np.float64), rtol=1e-5, atol=1e-5)


def test_logits_of_a_turned_head_are_those_of_the_head() -> None:
    hidden = jax.numpy.asarray(RANDOM.normal(size=(3, 16)).astype(np.float32))
    head = jax.numpy.asarray(RANDOM.normal(size=(16, 11)).astype(np.float32))
    scored = {"temperature": 0.7, "softcap": 2.0, "vocab": 9}
    found = head_logits(hidden, Turned.of(head, 1), **scored)
    np.testing.assert_allclose(found, head_logits(hidden, head, **scored), rtol=1e-5, atol=1e-5)


def test_a_turned_kernel_is_read_as_a_whole_only() -> None:
    with pytest.raises(TypeError, match="as a whole"):
        Turned.of(jax.numpy.ones((2, 3)), 1)[0]
