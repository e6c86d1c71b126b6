"""From files to params on devices and back, for every format and family.

A checkpoint (safetensors, GGUF, glassllm) offers tensors under Hugging Face's names; the family's
weight table says where each lies in our tree; every device reads the part that its sharding wants.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jrlhf.errors import ConfigError, MissingWeightError, ModelError
from jrlhf.models import hub
from jrlhf.models import tokenizer as tokenizers
from jrlhf.models.build import Net
from jrlhf.models.families import Weight, config_from_spec, family_of, spec_from_config
from jrlhf.models.gguf import GGUFCheckpoint
from jrlhf.models.glassllm import GlassLLMCheckpoint
from jrlhf.models.hf import writer
from jrlhf.models.hf.reader import Checkpoint, SafetensorsCheckpoint
from jrlhf.models.quantize import holds_quantized
from jrlhf.models.spec import DecoderSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Params = dict[str, Any]
Keys = tuple[str, ...]
Shardings = Callable[[Net, Params], Any]
_READERS: dict[str, Callable[[Path], Checkpoint]] = {
    "hf": SafetensorsCheckpoint,
    "gguf": GGUFCheckpoint,
    "glassllm": GlassLLMCheckpoint,
}
SAVE_DTYPES = ("float32", "bfloat16", "float16")
# What a bare trunk (transformers' LlamaModel) leaves off the names.
_TRUNK_PREFIX = "model."


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model came from, and what its files said besides the spec.

    Attributes:
        kind: "hf", "gguf" or "glassllm".
        path: directory or file on this machine.
        config: its config.json, or what that would say.
        generation_config: its generation_config.json, or None.
    """

    kind: str
    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None = None


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a local model directory or file of any format; reads no weight yet.

    Raises:
        MissingFileError: the directory holds no model, or a part of it is absent.
        UnsupportedModelError: a file of an unknown kind.
    """
    kind, path = hub.kind_of(path)
    return _READERS[kind](path)


def load_pretrained(
    name_or_path: str | Path,
    *,
    head: str = "causal",
    value_head: bool = False,
    num_labels: int | None = None,
    dtype: str = "float32",
    param_dtype: str = "float32",
    num_layers_unfrozen: int = -1,
    remat: str = "none",
    shardings: Shardings | None = None,
    key: jax.Array | None = None,
) -> tuple[Net, Params, Source]:
    """Loads a model from a directory, a hub id, a GGUF file or a glassllm directory.

    Args:
        name_or_path: what to load.
        head: "causal", or "classifier" for `num_labels` scores of the last token.
        value_head: adds a value head; drawn anew when the checkpoint has none.
        num_labels: scores of the classifier; the checkpoint's own number when None.
        dtype: compute type, "float32" or "bfloat16".
        param_dtype: type of the params; float32 for anything that is trained.
        num_layers_unfrozen: upper layers that are trained; -1 trains everything.
        remat: name of the rematerialisation policy.
        shardings: (net, abstract params) -> tree of shardings; one device when None.
        key: randomness for new heads.

    Returns:
        The net, its params, and the model's origin (for `save_pretrained`).

    Raises:
        MissingFileError: no such path or hub id.
        UnsupportedModelError: an architecture or flag that is not implemented.
        MissingWeightError: one error that lists every missing, unexpected and misshapen tensor.
    """
    checkpoint = open_checkpoint(hub.resolve(name_or_path))
    spec = spec_from_config(checkpoint.config, head=head, value_head=value_head)
    spec = spec.replace(
        dtype=dtype,
        remat=remat,
        trunk_layers=_trunk_layers(num_layers_unfrozen, spec.num_hidden_layers),
        num_labels=spec.num_labels if num_labels is None else num_labels,
    )
    net = Net(spec)
    names = _match(checkpoint, spec)
    abstract = net.abstract()
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = shardings(net, abstract) if shardings else jax.tree.map(lambda _: one, abstract)
    leaves = flatten(placed)
    filled: dict[Keys, jax.Array] = {}
    for path, leaf in flatten(abstract).items():
        places = {at: (row, names[name]) for row, name, at in _places(spec, path) if name in names}
        if places or leaf.size == 0:
            filled[path] = _fill(leaf.shape, leaves[path], checkpoint, places, param_dtype)
    new = [path for path in leaves if path not in filled]
    filled |= _draw(net, new, leaves, param_dtype, jax.random.key(0) if key is None else key)
    source = Source(
        checkpoint.kind, checkpoint.path, checkpoint.config, checkpoint.generation_config
    )
    return net, nest(filled), source


def _trunk_layers(unfrozen: int, layers: int) -> int:
    if unfrozen == -1:
        return 0
    if not 0 <= unfrozen <= layers:
        raise ConfigError(
            f"num_layers_unfrozen={unfrozen}, but the model has {layers} layers; give -1 (train"
            f" everything) or 0 to {layers}."
        )
    return layers - unfrozen


def _match(checkpoint: Checkpoint, spec: DecoderSpec) -> dict[str, str]:
    """{name in the weight table: name in the checkpoint}, for all that the spec needs.

    Raises:
        MissingWeightError: the two disagree.
    """
    shapes = dict(checkpoint.shapes)
    theirs = {name: name for name in shapes}
    if not any(name.startswith(_TRUNK_PREFIX) for name in shapes):
        heads = {name for row in _all_rows(spec) if not row.layered for name in [row.name]}
        theirs = {n if n in heads else _TRUNK_PREFIX + n: n for n in shapes}
    problems: list[str] = []
    found: dict[str, str] = {}
    for row in family_of(spec).weights(spec):
        for name, _, _ in row.places(spec):
            if name in theirs:
                found[name] = theirs.pop(name)
                shape = shapes[found[name]]
                if shape != row.hf_shape:
                    problems.append(f"shape of {name} is {shape}, expected {row.hf_shape}")
            elif not row.optional:
                problems.append(f"missing: {name}")
    # Heads that this use of the checkpoint leaves aside are no surprise, anything else is.
    aside = {name for row in _all_rows(spec) for name, _, _ in row.places(spec)}
    ignored = re.compile("|".join(family_of(spec).ignored) or r"(?!)")
    problems += [
        f"unexpected: {theirs[name]}"
        for name in theirs
        if name not in aside and not ignored.fullmatch(name)
    ]
    if problems:
        lines = "\n  ".join(problems)
        raise MissingWeightError(
            f"{checkpoint.path} does not hold the weights that its config describes"
            f" ({len(problems)} differences):\n  {lines}"
        )
    return found


def _all_rows(spec: DecoderSpec) -> list[Weight]:
    """The weight tables of every head that a checkpoint of this family may carry."""
    weights = family_of(spec).weights
    causal = spec.replace(head="causal", value_head=True, tie_word_embeddings=False)
    return [*weights(causal), *weights(spec.replace(head="classifier"))]


def _places(spec: DecoderSpec, path: Keys) -> Iterator[tuple[Weight, str, int | None]]:
    """(row, name, index along the stack) of every tensor that goes into one leaf."""
    for row in family_of(spec).weights(spec):
        for name, where, at in row.places(spec):
            if where == path:
                yield row, name, at


def _fill(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    checkpoint: Checkpoint,
    places: Mapping[int | None, tuple[Weight, str]],
    dtype: str,
) -> jax.Array:
    """Makes one leaf; each device's part is read once, and nothing else."""
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds not in parts:  # replicas share what was read
            parts[bounds] = _read_part(checkpoint, places, bounds, np.dtype(dtype))
        return parts[bounds]

    return jax.make_array_from_callback(shape, sharding, part)


def _read_part(
    checkpoint: Checkpoint,
    places: Mapping[int | None, tuple[Weight, str]],
    bounds: tuple[tuple[int, int], ...],
    dtype: np.dtype[Any],
) -> np.ndarray:
    sizes = tuple(stop - start for start, stop in bounds)
    if None in places:
        return _read_one(checkpoint, *places[None], bounds).astype(dtype)
    out = np.empty(sizes, dtype)
    for i, layer in enumerate(range(*bounds[0])):
        out[i] = _read_one(checkpoint, *places[layer], bounds[1:])
    return out


def _read_one(
    checkpoint: Checkpoint, row: Weight, name: str, bounds: tuple[tuple[int, int], ...]
) -> np.ndarray:
    """A part of one tensor, in our layout."""
    index = tuple(slice(*bound) for bound in bounds)
    try:
        theirs = row.hf_index(index)
    except ValueError:  # not one rectangle in the file
        whole = tuple(slice(0, n) for n in row.hf_shape)
        return row.from_hf(checkpoint.read(name, whole))[index]
    sizes = tuple(stop - start for start, stop in bounds)
    return row.from_hf(checkpoint.read(name, theirs), sizes)


def _draw(
    net: Net, paths: list[Keys], shardings: Mapping[Keys, Any], dtype: str, key: jax.Array
) -> dict[Keys, jax.Array]:
    """Initialises the leaves that no checkpoint tensor fills; the rest of `init` is dead code."""
    if not paths:
        return {}

    def draw(key: jax.Array) -> list[jax.Array]:
        leaves = flatten(net.init(key))
        return [leaves[path].astype(dtype) for path in paths]

    drawn = jax.jit(draw, out_shardings=[shardings[path] for path in paths])(key)
    return dict(zip(paths, drawn, strict=True))


def flatten(tree: Params) -> dict[Keys, Any]:
    """{path: leaf} of a nested dict."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(str(key.key) for key in path): leaf for path, leaf in leaves}


def nest(leaves: Mapping[Keys, Any]) -> Params:
    """Undoes `flatten`."""
    tree: Params = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def save_pretrained(
    directory: str | Path,
    net: Net,
    params: Params,
    *,
    source: Source | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "float32",
    max_shard_size: int | str = "5GB",
) -> Path:
    """Writes a model directory that transformers loads with bitwise equal weights.

    With several processes every one must call it; the first writes.

    Args:
        directory: made if absent; files of an earlier save are replaced.
        net: the model.
        params: stacked params, on any devices.
        source: the model's origin: its tokenizer and the keys of its configs are kept.
        tokenizer: written in place of the origin's.
        dtype: type of the saved weights: float32, bfloat16 or float16.
        max_shard_size: weights beyond it go into several files, e.g. "5GB".

    Raises:
        ConfigError: an unknown dtype or size.
    """
    if dtype not in SAVE_DTYPES:
        raise ConfigError(f"dtype={dtype!r} cannot be saved; known: {', '.join(SAVE_DTYPES)}.")
    if holds_quantized(params):
        raise ModelError(
            "A quantised base cannot be saved: save the adapter, or merge_and_unload() first."
        )
    max_bytes = writer.parse_size(max_shard_size)
    directory = Path(directory).expanduser()
    values = _export(net, params, np.dtype(dtype))
    if jax.process_index() == 0:
        _write(directory, net, values, source, tokenizer, dtype, max_bytes)
    else:
        for _ in values:  # takes part in gathering what other processes hold
            pass
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("jrlhf save_pretrained")
    return directory


def _write(
    directory: Path,
    net: Net,
    values: Iterator[tuple[str, np.ndarray]],
    source: Source | None,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str,
    max_bytes: int,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    writer.write_weights(
        directory, _tensors(net, np.dtype(dtype).itemsize), values, max_bytes=max_bytes
    )
    origin = {} if source is None else source.config
    config = writer.export_config(
        config_from_spec(net.spec), origin, classifier=net.spec.head == "classifier", dtype=dtype
    )
    if tokenizer is not None and config.get("pad_token_id") is None:
        config["pad_token_id"] = tokenizer.pad_token_id
    writer.write_json(directory / "config.json", config)
    generation = None if source is None else source.generation_config
    if net.spec.head == "causal":
        written = writer.export_generation_config(generation, config)
        writer.write_json(directory / "generation_config.json", written)
    tokenizers.save_tokenizer(
        directory, tokenizer=tokenizer, source=None if source is None else source.path
    )


def _leaf_order(net: Net) -> list[tuple[Keys, list[tuple[Weight, str, int | None]]]]:
    """Leaves with their tensors: the order of the export, one leaf in host memory at a time."""
    return [(path, list(_places(net.spec, path))) for path in flatten(net.abstract())]


def _tensors(net: Net, itemsize: int) -> list[writer.Tensor]:
    return [
        writer.Tensor(name, itemsize * int(np.prod(row.hf_shape)))
        for _, places in _leaf_order(net)
        for row, name, _ in places
    ]


def _export(net: Net, params: Params, dtype: np.dtype[Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor in the checkpoint's layout."""
    leaves = flatten(params)
    for path, places in _leaf_order(net):
        value = to_host(leaves[path])
        for row, name, at in places:
            yield name, _cast(row.to_hf(value if at is None else value[at]), dtype, name)


def to_host(array: jax.Array) -> np.ndarray:
    """A whole array on every process's host."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return jax.device_get(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _cast(value: np.ndarray, dtype: np.dtype[Any], name: str) -> np.ndarray:
    """Casts, but not into infinity: float16 ends at 65504."""
    with np.errstate(over="ignore"):
        cast = value.astype(dtype)
    if dtype == np.float16 and np.isinf(cast).any() and np.isfinite(value).all():
        raise ConfigError(f"{name} has values beyond float16; save as bfloat16 or float32.")
    return cast
