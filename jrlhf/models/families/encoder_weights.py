"""The weight table of any encoder: a family says the names, the shapes follow from the spec.

A family gives {our path, dotted: their name without .weight or .bias}; paths that the spec does not
build are simply not asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from jrlhf.models.encoder_spec import EncoderSpec
from jrlhf.models.families.weights import Weight, matrix, vector

Names = Mapping[str, str]


def encoder_weights(spec: EncoderSpec, names: Names) -> tuple[Weight, ...]:
    """Every tensor of a checkpoint with this spec, the pooler and the classifier optional."""
    rows = [*_embedding(spec, names), *_layer(spec, names)]
    d = spec.hidden_size
    if spec.pre_norm:
        rows += _norm("norm", names, d, bias=spec.norm_bias)
    rows += _linear("pooler.dense", names, (d,), (d,), bias=spec.pooler_bias, optional=True)
    if spec.pooler_norm:
        rows += _norm("pooler.norm", names, d, bias=spec.norm_bias, optional=True)
    rows += _linear("score", names, (d,), (spec.num_labels,), bias=spec.score_bias, optional=True)
    return tuple(rows)


def _embedding(spec: EncoderSpec, names: Names) -> Iterator[Weight]:
    d, width = spec.hidden_size, spec.embedding_size
    yield _table("embed.table", names, spec.vocab_size, width)
    if spec.learned_positions:
        yield _table("embed.positions", names, spec.position_rows, width)
    if spec.type_vocab_size:
        yield _table("embed.types", names, spec.type_vocab_size, width)
    if width != d:
        yield from _linear("embed.proj", names, (width,), (d,), bias=False)
    yield from _norm("embed.norm", names, d, bias=spec.norm_bias)
    if spec.relative is not None and spec.relative.attention:
        yield _table("embed.relative", names, 2 * spec.relative.span, d)
    if spec.relative is not None and spec.relative.norm:
        yield from _norm("embed.relative_norm", names, d)
    if spec.conv_kernel_size:
        # Theirs is [outputs, inputs, width].
        shape = (spec.conv_kernel_size, d, d)
        name = names["embed.conv.taps"]
        path = ("embed", "conv", "taps")
        groups = ((2,), (1,), (0,))
        yield Weight(path=(*path, "kernel"), name=f"{name}.weight", shape=shape, groups=groups)
        yield vector((*path, "bias"), f"{name}.bias", d)
        yield from _norm("embed.conv.norm", names, d)


def _layer(spec: EncoderSpec, names: Names) -> Iterator[Weight]:
    d, f = (spec.hidden_size,), (spec.intermediate_size,)
    heads = (spec.num_attention_heads, spec.head_dim)
    bias, relative = spec.attention_bias, spec.relative
    projections = ["q", "k", "v"] if spec.rope is None else []
    for name in projections:
        yield from _linear(f"layers.attn.{name}", names, d, heads, bias=bias)
    if spec.rope is not None:
        yield from _linear("layers.attn.qkv", names, d, (3, *heads), bias=bias)
    if relative is not None and relative.attention and not relative.share_keys:
        for name, term in (("position_k", "c2p"), ("position_q", "p2c")):
            if term in relative.terms:
                yield from _linear(f"layers.attn.{name}", names, d, heads, bias=True)
    yield from _linear("layers.attn.o", names, heads, d, bias=bias)
    for row in _norm("layers.attn_norm", names, *d, bias=spec.norm_bias):
        later = tuple(range(1, spec.num_hidden_layers)) if spec.pre_norm else None
        yield dataclasses.replace(row, layers=later)
    up = (2, *f) if spec.gated_mlp else f
    yield from _linear("layers.mlp.up", names, d, up, bias=spec.mlp_bias)
    yield from _linear("layers.mlp.down", names, f, d, bias=spec.mlp_bias)
    yield from _norm("layers.mlp_norm", names, *d, bias=spec.norm_bias)


def _table(path: str, names: Names, rows: int, columns: int) -> Weight:
    return Weight(
        path=tuple(path.split(".")),
        name=f"{names[path]}.weight",
        shape=(rows, columns),
        groups=((0,), (1,)),
    )


def _norm(
    path: str, names: Names, size: int, *, bias: bool = True, optional: bool = False
) -> Iterator[Weight]:
    own = tuple(path.split("."))
    yield vector((*own, "scale"), f"{names[path]}.weight", size, optional=optional)
    if bias:
        yield vector((*own, "bias"), f"{names[path]}.bias", size, optional=optional)


def _linear(
    path: str,
    names: Names,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    *,
    bias: bool,
    optional: bool = False,
) -> Iterator[Weight]:
    own, shape = tuple(path.split(".")), (*inputs, *outputs)
    weight = f"{names[path]}.weight"
    yield matrix((*own, "kernel"), weight, *shape, inputs=len(inputs), optional=optional)
    if bias:
        yield vector((*own, "bias"), f"{names[path]}.bias", *outputs, optional=optional)
