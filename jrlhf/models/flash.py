"""The platforms' own flash attention, called as `models/attend.py` wants it.

Rows are right-padded or have segments, scores are causal. Scores of one row never lie in memory
together: the kernels keep a running maximum and sum, in float32.

References:
    Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jrlhf.models.attention import Scoring

# A TPU's vector registers are so wide, and the sequence is padded to a multiple of it.
LANES = 128
# Sizes of a kernel's blocks, the first that divides the sequence is taken.
BLOCKS = (512, 384, 256, LANES)


def cudnn(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b s k e"],
    v: Float[Array, "b s k e"],
    segments: Int[Array, "b s"] | None = None,
    *,
    window: int | None,
    dtype: str,
    scoring: Scoring,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "b s h e"]:
    """cuDNN's flash attention, for CUDA.

    Segments are given to it as a mask [b 1 s s] in bfloat16, which is no smaller than one head's
    scores; without segments nothing of that size is made.

    Args:
        q: queries, rotated, not scaled.
        k: keys, rotated.
        v: values.
        segments: document of each token.
        window: keys that a query reads, its own included.
        dtype: bfloat16.
        scoring: its scale; there can be no soft-cap.
        implementation: "xla" is the same call without cuDNN, to see what is asked of it.
    """
    length = q.shape[1]
    # jax differentiates even lengths only. Nobody reads what comes after all tokens.
    q, k, v = (_padded(x, 2, 1) for x in (q, k, v))
    mask = None
    if segments is not None:
        segments = _padded(segments, 2, 1)
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    out = jax.nn.dot_product_attention(
        q.astype(dtype),
        k.astype(dtype),
        v.astype(dtype),
        mask=mask,
        scale=scoring.scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return out[:, :length]


def splash(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b s k e"],
    v: Float[Array, "b s k e"],
    segments: Int[Array, "b s"] | None = None,
    sinks: Float[Array, " h"] | None = None,
    *,
    window: int | None,
    dtype: str,
    scoring: Scoring,
    interpret: bool = False,
) -> Float[Array, "b s h e"]:
    """Splash attention (Pallas), for TPUs: blocks that the mask leaves empty are never read.

    Args:
        q: queries, rotated, not scaled.
        k: keys, rotated.
        v: values.
        segments: document of each token.
        sinks: a score per head that takes weight and gives no value.
        window: keys that a query reads, its own included.
        dtype: type of the operands and of the result.
        scoring: scale and soft-cap.
        interpret: run the kernel's program as XLA operations, on any platform; slow.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    length, e = q.shape[1], q.shape[3]
    scale = e**-0.5 if scoring.scale is None else scoring.scale
    # Padding comes after all tokens, so that causality alone keeps them from reading it.
    q, k, v = (_padded(x, LANES, 1).swapaxes(1, 2) for x in (q * scale, k, v))
    kernel = _kernel(lib, q.shape[1], q.shape[2], window, scoring.softcap, interpret)
    ids = None
    if segments is not None:
        segments = _padded(segments, LANES, 1)
        ids = lib.SegmentIds(q=segments, kv=segments)
    own = None if sinks is None else _like_its_gradient(sinks.astype(jnp.float32))
    mapped = jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0, None))
    out = mapped(q.astype(dtype), k.astype(dtype), v.astype(dtype), ids, own)
    return out.swapaxes(1, 2)[:, :length]


def _kernel(
    lib: Any, heads: int, length: int, window: int | None, softcap: float | None, interpret: bool
) -> Any:
    shape = (length, length)
    if window is None or window >= length:
        mask = lib.CausalMask(shape)
    else:
        mask = lib.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in BLOCKS if length % size == 0)
    sizes = lib.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return lib.make_splash_mha(
        lib.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        # What `spec.remat` "attention" keeps: the output and the log-sum-exps.
        residual_checkpoint_name="attention",
        interpret=interpret,
    )


@jax.custom_vjp
def _like_its_gradient(x: Array) -> Array:
    """x, whose gradient gets x's dtype: jax 0.10's kernel gives that of sinks in the operands'."""
    return x


_like_its_gradient.defvjp(lambda x: (x, None), lambda _, g: (g.astype(jnp.float32),))


def _padded(x: Array, multiple: int, axis: int) -> Array:
    """Zeros after the end of an axis, up to a multiple."""
    more = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)]) if more else x
