"""Makes a family's weight table from a spec and the family's names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from jrlhf.models.families.weights import Part, Path, Weight, matrix, vector
from jrlhf.models.spec import DecoderSpec

LLAMA_MODULES = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.sinks": "self_attn.sinks",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "dense.gate": "mlp.gate_proj",
    "dense.up": "mlp.up_proj",
    "dense.down": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """What a family calls things; the defaults are Llama's.

    Attributes:
        embed, norm, head, positions: names of what is there once, without ".weight"; project_in
            and project_out where embeddings have a width of their own.
        layer: what the names in a layer begin with.
        modules: our modules of a layer -> theirs. With "{expert}" there is one per expert.
        fused: {their module: ours in it, in order}; `modules` need not name these.
        split: how a fused module is cut: "concat" one after the other, "heads" per head.
        tokens: the token classifier.
        conv1d: kernels in a layer are [inputs, outputs] (GPT-2).
    """

    embed: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    positions: str = ""
    project_in: str = ""
    project_out: str = ""
    layer: str = "model.layers.{layer}."
    modules: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_MODULES)
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    split: Literal["concat", "heads"] = "concat"
    tokens: str = "score"
    conv1d: bool = False


class _Linear(NamedTuple):
    """A linear map of a layer: the shapes of its two sides."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bias: bool


def table(spec: DecoderSpec, names: Names) -> tuple[Weight, ...]:
    """Every tensor of a checkpoint with this spec's heads (value head: TRL's names)."""
    d, e, v, n = spec.hidden_size, spec.head_size, spec.vocab_size, spec.num_labels
    rows = [_rows_of_vectors(("embed", "table"), names.embed, v, e)]
    if spec.embedding_size:
        rows.append(matrix(("project_in", "kernel"), f"{names.project_in}.weight", e, d))
        rows.append(matrix(("project_out", "kernel"), f"{names.project_out}.weight", d, e))
    if spec.positions == "learned":
        count = spec.max_position_embeddings + spec.position_offset
        rows.append(_rows_of_vectors(("positions", "table"), names.positions, count, d))
    rows += _norm(spec, ("norm",), names.norm) if spec.final_norm else []
    rows += _layer(spec, names)
    if spec.head != "causal":
        name = "score" if spec.head == "classifier" else names.tokens
        rows.append(matrix(("score", "kernel"), f"{name}.weight", e, n, optional=True))
        if spec.head == "tokens":
            rows.append(vector(("score", "bias"), f"{name}.bias", n, optional=True))
    else:
        if not spec.tie_word_embeddings:
            rows.append(matrix(("head", "kernel"), f"{names.head}.weight", e, v))
        if spec.head_bias:
            rows.append(vector(("head", "bias"), f"{names.head}.bias", v))
    if spec.value_head:
        rows.append(matrix(("value", "kernel"), "v_head.summary.weight", e, 1, optional=True))
        rows.append(vector(("value", "bias"), "v_head.summary.bias", 1, optional=True))
    return tuple(rows)


def _rows_of_vectors(path: Path, name: str, count: int, width: int) -> Weight:
    return Weight(path=path, name=f"{name}.weight", shape=(count, width), groups=((0,), (1,)))


def _norm(spec: DecoderSpec, path: Path, name: str) -> list[Weight]:
    if not spec.norm_scale:
        return []
    rows = [vector((*path, "scale"), f"{name}.weight", spec.hidden_size)]
    if spec.norm == "layer" and spec.norm_bias:
        rows.append(vector((*path, "bias"), f"{name}.bias", spec.hidden_size))
    return rows


def _layer(spec: DecoderSpec, names: Names) -> Iterator[Weight]:
    """The tensors of one layer."""
    linears = _linears(spec)
    parts = {
        ours: (theirs, _part(ours, members, linears, names))
        for theirs, members in names.fused.items()
        for ours in members
    }
    for ours in _norms(spec):
        yield from _norm(spec, _path(ours), names.layer + names.modules[ours])
    yield from _small(spec, names)
    for ours, (inputs, outputs, bias) in linears.items():
        theirs, part = parts.get(ours) or (names.modules.get(ours), None)
        if theirs is None:  # the family writes these rows itself
            continue
        path, name = _path(ours), names.layer + theirs
        # Per expert the kernel has one axis less than ours, which is stacked over experts too.
        inputs, outputs = (inputs[1:], outputs[1:]) if "{expert}" in name else (inputs, outputs)
        own = None if part is None else dataclasses.replace(part, axis=int(names.conv1d))
        kernel = matrix(
            (*path, "kernel"),
            f"{name}.weight",
            *inputs,
            *outputs,
            inputs=len(inputs),
            turned=not names.conv1d,
            part=own,
        )
        layers = _layers(spec, ours)
        yield dataclasses.replace(kernel, layers=layers)
        if bias:
            row = vector((*path, "bias"), f"{name}.bias", *outputs, part=part)
            yield dataclasses.replace(row, layers=layers)


def _layers(spec: DecoderSpec, ours: str) -> tuple[int, ...] | None:
    """The layers that have this map, None for all: experts and plain MLPs share them out."""
    dense = spec.moe.dense_layers if spec.moe else ()
    if not dense or ours.startswith("attn."):
        return None
    if ours.startswith("dense."):
        return dense
    return tuple(layer for layer in range(spec.num_hidden_layers) if layer not in dense)


def _path(ours: str) -> Path:
    return ("layers", *ours.split("."))


def _norms(spec: DecoderSpec) -> list[str]:
    before, after = ["attn_norm", "mlp_norm"], ["attn_post_norm", "mlp_post_norm"]
    return {"shared": before[:1], "post": after, "after": after, "sandwich": before + after}.get(
        spec.block, before
    )


def _small(spec: DecoderSpec, names: Names) -> Iterator[Weight]:
    """Norms of queries and keys, and sinks."""
    h, k, e = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    for ours, heads in (("attn.q_norm", h), ("attn.k_norm", k)):
        if spec.qk_norm == "none":
            break
        shape = (e,) if spec.qk_norm == "head" else (heads, e)
        name = f"{names.layer}{names.modules[ours]}.weight"
        # Over all heads together theirs is flat; per head it has two axes like ours.
        groups = ((0,), (1,)) if spec.qk_norm == "heads" else (tuple(range(len(shape))),)
        yield Weight(path=(*_path(ours), "scale"), name=name, shape=shape, groups=groups)
    if spec.attention_sinks:
        yield vector(_path("attn.sinks"), names.layer + names.modules["attn.sinks"], h)


def _linears(spec: DecoderSpec) -> dict[str, _Linear]:
    """The linear maps of a layer; an axis of experts stands on both sides."""
    d, f, e = (spec.hidden_size,), (spec.intermediate_size,), spec.head_dim
    h, k = spec.num_attention_heads, spec.num_key_value_heads
    maps = {
        "attn.q": _Linear(d, (h, e), spec.attention_bias),
        "attn.k": _Linear(d, (k, e), spec.attention_bias),
        "attn.v": _Linear(d, (k, e), spec.attention_bias),
        "attn.o": _Linear((h, e), d, spec.o_bias),
    }
    if spec.moe is not None:
        x, bias = (spec.moe.num_experts,), spec.moe.expert_bias
        maps["mlp.router"] = _Linear(d, x, spec.moe.router_bias)
        maps["mlp.gate"] = maps["mlp.up"] = _Linear(x + d, x + f, bias)
        maps["mlp.down"] = _Linear(x + f, x + d, bias)
        if spec.moe.dense_layers:
            wide = (spec.moe.dense_size,)
            maps["dense.gate"] = maps["dense.up"] = _Linear(d, wide, spec.mlp_bias)
            maps["dense.down"] = _Linear(wide, d, spec.mlp_bias)
        return maps
    if spec.mlp == "gated":
        maps["mlp.gate"] = _Linear(d, f, spec.mlp_bias)
    maps["mlp.up"] = _Linear(d, f, spec.mlp_bias)
    maps["mlp.down"] = _Linear(f, d, spec.mlp_bias)
    return maps


def _part(ours: str, members: tuple[str, ...], linears: dict[str, _Linear], names: Names) -> Part:
    """Where one of ours lies in a fused module, on the axis of outputs (0: see the caller)."""
    outer = linears[ours].outputs[0] if names.split == "heads" else 1
    sizes = [math.prod(linears[member].outputs) // outer for member in members]
    at = members.index(ours)
    return Part(0, outer, sum(sizes[:at]), sizes[at], sum(sizes))
