"""A frozen base in eight or four bits (QLoRA), through qwix.

Only the kernels of linear maps are quantised, experts' among them; each is dequantised where it is
used, one layer at a time, and never trained. int8 has one scale per output and layer; nf4 one per
block of up to 64 inputs. A leaf is quantised as soon as it is read.

References:
    Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jrlhf.errors import ConfigError, MissingFileError
from jrlhf.models.decoder import Decoder
from jrlhf.models.encoder_spec import AnySpec
from jrlhf.models.layers import Linear
from jrlhf.models.moe import ExpertMap
from jrlhf.models.spec import DecoderSpec

Path = tuple[str, ...]
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


def quantizer(spec: AnySpec, kind: str) -> Callable[[Path, Array], Any]:
    """What becomes of each leaf of a base as it is read: kernels are quantised, others kept.

    Scales, and so what a kernel is dequantised to, have the spec's compute type.

    Args:
        spec: of the base.
        kind: "int8" or "nf4".

    Raises:
        ConfigError: another kind, or the model is an encoder.
        MissingFileError: qwix is not installed.
    """
    if kind not in KINDS:
        raise ConfigError(f"A base can be quantised to {' or '.join(KINDS)}, not {kind!r}.")
    if not isinstance(spec, DecoderSpec):
        raise ConfigError(
            f"A {spec.model_type} model is an encoder: load_in_8bit and load_in_4bit are for"
            " decoders below an adapter. Leave them out; param_dtype='bfloat16' halves its memory."
        )
    _qwix()
    kernels, dtype = _kernels(spec), spec.dtype

    def keep(path: Path, leaf: Array) -> Any:
        if path not in kernels:
            return leaf
        codes = _quantize(leaf, kind, *kernels[path], dtype)
        # The leaf itself is of no use any more: the next one may need its room.
        jax.block_until_ready(codes)
        return Quantized(codes)

    return keep


def _kernels(spec: DecoderSpec) -> dict[Path, tuple[int, tuple[int, ...]]]:
    """{path: (axes that stack it, axes of one that are summed)} of what is quantised."""
    found: dict[Path, tuple[int, tuple[int, ...]]] = {}
    module = nnx.eval_shape(lambda: Decoder(spec, jax.random.key(0)))
    for path, part in nnx.iter_modules(module):
        keys = (*map(str, path), "kernel")
        stack = int(keys[0] in ("trunk", "layers"))
        if isinstance(part, Linear):
            found[keys] = stack, tuple(range(part.inputs))
        elif isinstance(part, ExpertMap):
            found[keys] = stack, (1,)
    return found


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


def _quantize(kernel: Array, kind: str, stack: int, inputs: tuple[int, ...], dtype: str) -> Any:
    """Quantises one kernel, or each of a stack; `inputs` are the axes of one that are summed."""
    qwix, last = _qwix(), inputs[-1]
    rank = kernel.ndim - stack

    def one(layer: Array) -> Any:
        layer = layer.astype(jnp.float32)
        if kind == "int8":
            kept = tuple(axis for axis in range(rank) if axis not in inputs)
            return qwix.quantize(
                layer, jnp.int8, channelwise_axes=kept, scale_dtype=jnp.dtype(dtype)
            )
        size = layer.shape[last]
        block = next(n for n in range(min(BLOCK, size), 0, -1) if size % n == 0)
        return qwix.quantize(
            layer,
            "nf4",
            channelwise_axes=tuple(axis for axis in range(rank) if axis != last),
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
