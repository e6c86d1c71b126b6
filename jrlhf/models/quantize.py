"""A frozen base in eight or four bits (QLoRA), through qwix.

Only the kernels of linear maps are quantised; each is dequantised where it is used, one layer at a
time, and never trained. int8 has one scale per output and layer; nf4 one per block of up to 64
inputs.

References:
    Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jrlhf.errors import ConfigError, MissingFileError
from jrlhf.models.lora.plan import Linears
from jrlhf.models.lora.tree import get, with_entry

KINDS = ("int8", "nf4")
# Inputs that share a scale of nf4; fewer where 64 does not divide them.
BLOCK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantised kernel; `kernel[...]`, as modules read every kernel, dequantises it.

    Attributes:
        codes: qwix's array of codes and scales, of the kernel's rank.
    """

    codes: Any

    def __getitem__(self, index: Any) -> Array:
        if index is not Ellipsis:
            raise TypeError("A quantised kernel can be read as a whole only.")
        return _qwix().dequantize(self.codes)


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def holds_quantized(params: Any) -> bool:
    """Whether any leaf of a tree is quantised."""
    return any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))


def quantize(params: Any, linears: Sequence[Linears], kind: str, *, dtype: str) -> Any:
    """The tree with the kernels of its linear maps quantised; the other leaves are shared.

    Args:
        params: the base.
        linears: `build.linear_maps` of its spec.
        kind: "int8" or "nf4".
        dtype: of the scales, and so of what a kernel is dequantised to: the compute type.

    Raises:
        ConfigError: another kind.
        MissingFileError: qwix is not installed.
    """
    if kind not in KINDS:
        raise ConfigError(f"A base can be quantised to {' or '.join(KINDS)}, not {kind!r}.")
    _qwix()
    for linear in linears:
        path = (*linear.path, "kernel")
        stack, inputs = int(linear.stacked), len(linear.inputs)
        codes = _quantize(get(params, path), kind, stack, inputs, dtype)
        params = with_entry(params, path, Quantized(codes))
    return params


def dense(params: Any) -> Any:
    """The tree with every quantised kernel as plain float32."""
    return jax.tree.map(
        lambda leaf: leaf[...].astype(jnp.float32) if is_quantized(leaf) else leaf,
        params,
        is_leaf=is_quantized,
    )


def asked_for(options: dict[str, Any]) -> str | None:
    """Takes transformers' `load_in_8bit` and `load_in_4bit` out of options: a kind, or None."""
    eight, four = options.pop("load_in_8bit", False), options.pop("load_in_4bit", False)
    for name, value in (("load_in_8bit", eight), ("load_in_4bit", four)):
        if value not in (True, False, None):
            raise ConfigError(f"{name} must be True or False, got {value!r}.")
    if eight and four:
        raise ConfigError("load_in_8bit and load_in_4bit were both given; give one of them.")
    return "int8" if eight else "nf4" if four else None


def _quantize(kernel: Array, kind: str, stack: int, inputs: int, dtype: str) -> Any:
    """Quantises one (stack of) kernels [stack..., inputs..., outputs...], one layer at a time."""
    qwix, last = _qwix(), inputs - 1
    outputs = tuple(range(inputs, kernel.ndim - stack))

    def one(layer: Array) -> Any:
        layer = layer.astype(jnp.float32)
        if kind == "int8":
            return qwix.quantize(
                layer, jnp.int8, channelwise_axes=outputs, scale_dtype=jnp.dtype(dtype)
            )
        size = layer.shape[last]
        block = next(n for n in range(min(BLOCK, size), 0, -1) if size % n == 0)
        return qwix.quantize(
            layer,
            "nf4",
            channelwise_axes=(*range(last), *outputs),
            tiled_axes={last: block},
            scale_dtype=jnp.dtype(dtype),
        )

    return jax.jit(lambda x: jax.lax.map(one, x) if stack else one(x))(kernel)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise MissingFileError(
            "A quantised base needs the package qwix: pip install 'jrlhf[qlora]'."
        ) from error
    return qwix
