"""bfloat16 compute: every head runs forward and backward, and stays near float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.models.build import Net
from jrlhf.models.spec import DecoderSpec


def gradient(dtype: str, *, head: str, tied: bool) -> Any:
    # The MLP is wider than the rest, and the row count no multiple of anything: the shapes in
    # which XLA's CPU backend once had no bfloat16 dot.
    spec = DecoderSpec(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
        head=head,
        num_labels=1,
        value_head=head == "causal",
        dtype=dtype,
    )
    net = Net(spec)
    params = jax.jit(net.init)(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (3, 11), 0, 97)

    def loss(params: Any) -> jax.Array:
        hidden = net.hidden(params, ids)
        if head == "classifier":
            return jnp.sum(net.scores(params, hidden, jnp.full(3, 7)))
        logits = jnp.dot(hidden, net.head(params), preferred_element_type=jnp.float32)
        return jnp.sum(jnp.square(logits)) + jnp.sum(net.values(params, hidden))

    return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params))


@pytest.mark.parametrize(
    ("head", "tied"), [("causal", True), ("causal", False), ("classifier", True)]
)
def test_gradients_in_bfloat16_stay_near_those_in_float32(head: str, tied: bool) -> None:
    low = gradient("bfloat16", head=head, tied=tied)
    high = gradient("float32", head=head, tied=tied)
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True):
        assert a.dtype == b.dtype == np.float32
        # bfloat16 keeps 8 bits; a few dots in a row lose some of them.
        np.testing.assert_allclose(a, b, atol=0.05 * max(np.abs(b).max(), 1e-6))
