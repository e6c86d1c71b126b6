"""Attention of tokens on tokens: one function, and the kernel that it takes on each platform.

| path | where | what it lacks |
|---|---|---|
| `xla` (models/attention.py) | everywhere | nothing |
| `cudnn` (models/flash.py) | CUDA | float32, soft-caps, sinks, odd or large heads |
| `splash` (models/flash.py) | TPU | a sequence that the mesh cuts |

"auto" takes the platform's kernel, and `xla` where that lacks something. A kernel that is asked for
by name and lacks something is an error. All of them keep the softmax's statistics in float32.
Reading a cache is another matter (`attention.attend_cache`), and `xla` everywhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jrlhf.errors import ConfigError, suggest
from jrlhf.models import flash
from jrlhf.models.attention import Scoring, attend_causal
from jrlhf.models.axes import cuts, per_shard
from jrlhf.models.encoder_spec import AnySpec, EncoderSpec
from jrlhf.models.spec import ATTENTIONS, DecoderSpec
from jrlhf.ops.layout import platform

# The flash kernel of each platform that has one.
KERNELS = {"tpu": "splash", "cuda": "cudnn"}
# transformers' names. What people mean by all but the first is: the fast one.
ALIASES = {
    "eager": "xla",
    "sdpa": "auto",
    "flash_attention_2": "auto",
    "flash_attention_3": "auto",
}
# What cuDNN takes on every GPU that it runs on.
CUDNN_HEAD_DIM = 128
# Stands for "no window" among a model's windows.
NO_WINDOW = int(np.iinfo(np.int32).max)


class How(NamedTuple):
    """What decides a layer's attention besides its arrays (static).

    Attributes:
        asked: one of `spec.ATTENTIONS`.
        dtype: type of the dots' operands and of the result.
        scoring: scale and soft-cap.
        windows: the sizes that layers of this model have, ascending, `NO_WINDOW` among them.
    """

    asked: str
    dtype: str
    scoring: Scoring
    windows: tuple[int, ...] = (NO_WINDOW,)

    @classmethod
    def of(cls, spec: DecoderSpec) -> How:
        """Of a model's layers."""
        windows = tuple(sorted({window or NO_WINDOW for window in spec.windows or (0,)}))
        scoring = Scoring(spec.attention_scale, spec.attention_softcap)
        return cls(spec.attention, spec.dtype, scoring, windows)


def named(name: str | None) -> str:
    """The path that a user's `attn_implementation` names; transformers' names are understood.

    Raises:
        ConfigError: an unknown name.
    """
    name = "auto" if name is None else name
    if name not in ATTENTIONS and name not in ALIASES:
        known = [*ATTENTIONS, *ALIASES]
        raise ConfigError(
            f"attn_implementation={name!r} is not known; write 'auto' for the platform's own "
            f"kernel, or one of {', '.join(known[1:])}.{suggest(str(name), known)}"
        )
    return ALIASES.get(name, name)


def choose(
    asked: str,
    *,
    platform: str,
    dtype: str,
    head_dim: int,
    softcap: bool = False,
    sinks: bool = False,
    cut: bool = False,
) -> str:
    """The path: "xla", "cudnn", "splash" or "splash_interpret".

    Args:
        asked: one of `spec.ATTENTIONS`.
        platform: of `axes.platform`.
        dtype: of the dots' operands.
        head_dim: channels of a head.
        softcap: scores are capped.
        sinks: heads have sinks.
        cut: the mesh cuts the sequence.

    Raises:
        ConfigError: a kernel was asked for by name and cannot do it.
    """
    kernel = KERNELS.get(platform, "xla") if asked == "auto" else asked
    lack = None
    if kernel == "cudnn":
        lack = _cudnn_lacks(platform, dtype, head_dim, softcap, sinks)
    elif kernel == "splash" and platform != "tpu":
        lack = f"needs a TPU, and this program is for {platform}"
    if lack is None and kernel != "xla" and cut:
        lack = "cannot read a sequence that the mesh cuts"
    if lack is None:
        return kernel
    if asked == "auto":
        return "xla"
    raise ConfigError(
        f"attn_implementation={asked!r} {lack}. Write 'auto', which takes the platform's kernel "
        "where it can and 'xla' elsewhere."
    )


def _cudnn_lacks(
    platform: str, dtype: str, head_dim: int, softcap: bool, sinks: bool
) -> str | None:
    lacks = {
        f"needs a CUDA GPU, and this program is for {platform}": platform != "cuda",
        f"computes in bfloat16 alone, and dtype is {dtype}": dtype != "bfloat16",
        "has no soft-cap, and this model caps its scores": softcap,
        "has no sinks, and this model has them": sinks,
        f"takes heads of a multiple of 8 channels up to {CUDNN_HEAD_DIM}, and this model's have "
        f"{head_dim}": head_dim % 8 > 0 or head_dim > CUDNN_HEAD_DIM,
    }
    return next((lack for lack, found in lacks.items() if found), None)


def choose_for(spec: AnySpec, asked: str, on: str | None = None) -> AnySpec:
    """The spec with the attention that was asked for.

    Args:
        spec: a model.
        asked: of `named`.
        on: the platform; None: that of this process.

    Raises:
        ConfigError: the kernel does not run there, or not this model.
    """
    if isinstance(spec, EncoderSpec):
        if asked not in ("auto", "xla"):
            raise ConfigError(
                f"attn_implementation={asked!r} is for decoders; {spec.model_type} reads a text "
                "from both sides, which 'xla' does on every platform. Leave it out."
            )
        return spec
    choose(
        asked,
        platform=platform() if on is None else on,
        dtype=spec.dtype,
        head_dim=spec.head_dim,
        softcap=spec.attention_softcap is not None,
        sinks=spec.attention_sinks,
    )
    return spec.replace(attention=asked)


def attend(
    q: Float[Array, "b s h e"],
    k: Float[Array, "b s k e"],
    v: Float[Array, "b s k e"],
    segments: Int[Array, "b s"] | None,
    window: Int[Array, ""] | None,
    sinks: Float[Array, " h"] | None,
    *,
    how: How,
) -> Float[Array, "b s h e"]:
    """Each query reads the keys at and before it, of its own segment when segments are given.

    Args:
        q: queries, rotated.
        k: keys, rotated.
        v: values.
        segments: document of each token, 0 for padding; None where rows are right-padded.
        window: keys that a query of this layer reads, its own included; None: all before it.
        sinks: a score per head that takes weight and gives no value.
        how: the rest.

    Raises:
        ConfigError: a kernel was asked for by name and cannot do it.
    """
    path = choose(
        how.asked,
        platform=platform(),
        dtype=how.dtype,
        head_dim=q.shape[3],
        softcap=how.scoring.softcap is not None,
        sinks=sinks is not None,
        cut=cuts("sequence", q.shape[1]) > 1,
    )
    if path == "xla":
        return attend_causal(q, k, v, segments, window, sinks, how.dtype, how.scoring)

    def run(size: int) -> Callable[[], Array]:
        kernel = functools.partial(
            flash.cudnn if path == "cudnn" else flash.splash,
            window=None if size == NO_WINDOW else size,
            dtype=how.dtype,
            scoring=how.scoring,
        )
        if path == "splash_interpret":
            kernel = functools.partial(kernel, interpret=True)
        return lambda: _on_shards(kernel, q, k, v, segments, sinks)

    if window is None or len(how.windows) == 1:
        return run(how.windows[-1])()
    # A kernel's mask is static, a layer's window is not: one kernel per size that the model has.
    if not isinstance(window, jax.Array):  # a layer that stands alone
        return run(how.windows[int(np.searchsorted(how.windows, window))])()
    which = jnp.searchsorted(jnp.asarray(how.windows), window)
    return jax.lax.switch(which, [run(size) for size in how.windows])


def _on_shards(
    kernel: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    sinks: Array | None,
) -> Array:
    """Runs a kernel on every device's rows and heads."""
    parts = cuts("heads", q.shape[2])
    if k.shape[2] % parts:
        # Fewer key-value heads than parts: each part gets a copy of those that its queries read.
        copies = parts // math.gcd(parts, k.shape[2])
        k, v = jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2)
    heads = ("batch", None, "heads", None)
    given = {"segments": segments, "sinks": sinks}
    names = [name for name, x in given.items() if x is not None]
    axes = {"segments": ("batch", None), "sinks": ("heads",)}

    def run(q: Array, k: Array, v: Array, *rest: Array) -> Array:
        return kernel(q, k, v, **dict(zip(names, rest, strict=True)))

    mapped = per_shard(run, heads, heads, heads, *(axes[name] for name in names))
    return mapped(q, k, v, *(given[name] for name in names))
