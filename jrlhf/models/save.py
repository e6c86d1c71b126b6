"""From params on devices to a directory that transformers loads; `load` is the way there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jrlhf.errors import ConfigError, ModelError
from jrlhf.models import hub, special_tokens
from jrlhf.models.build import Params
from jrlhf.models.build_encoder import AnyNet
from jrlhf.models.families import Weight, config_from_spec
from jrlhf.models.hf import writer
from jrlhf.models.load import Keys, Source, flatten
from jrlhf.models.match import At, places_of
from jrlhf.models.quantize import holds_quantized
from jrlhf.models.tokenizer_files import is_home, save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAVE_DTYPES = ("float32", "bfloat16", "float16")


def save_pretrained(
    directory: str | Path,
    net: AnyNet,
    params: Params,
    *,
    source: Source | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    own_tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "float32",
    max_shard_size: int | str = "5GB",
    keep_vocab_padding: bool = False,
) -> Path:
    """Writes a model directory that transformers loads with bitwise equal weights.

    A save that fails leaves an earlier one's weights. Every process must call it; the first writes.

    Args:
        directory: made if absent; files of an earlier save are replaced, also an adapter's. A
            tokenizer that was saved there by itself stays, unless one is given.
        net: the model.
        params: stacked params, on any devices.
        source: the model's origin: its tokenizer and the keys of its configs are kept.
        tokenizer: written in place of whatever lies there; the configs take up its special tokens.
        own_tokenizer: the model's, where it is held: written in place of the origin's.
        dtype: type of the saved weights: float32, bfloat16 or float16.
        max_shard_size: weights beyond it go into several files, e.g. "5GB".
        keep_vocab_padding: also writes the rows that pad the vocabulary, as if they were tokens.

    Raises:
        ConfigError: an unknown dtype or size, no directory, values beyond the dtype.
        UnsupportedModelError: the family's config has no words for the model.
    """
    if dtype not in SAVE_DTYPES:
        raise ConfigError(f"dtype={dtype!r} cannot be saved; known: {', '.join(SAVE_DTYPES)}.")
    if holds_quantized(params):
        raise ModelError(
            "A quantised base cannot be saved: save the adapter, or merge_and_unload()."
        )
    max_bytes = writer.parse_size(max_shard_size)
    if keep_vocab_padding:
        net = net.of(net.spec.replace(vocab_size=net.spec.vocab_rows, vocab_padding=0))
    # Every process finds out what is wrong before the first waits for the others' weights.
    directory = hub.target(directory)
    configs = _configs(net, source, tokenizer, own_tokenizer, dtype)
    values = _export(net, params, np.dtype(dtype))
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        tensors = _tensors(net, np.dtype(dtype).itemsize)
        writer.write_weights(directory, tensors, values, max_bytes=max_bytes)
        origin = None if source is None else source.path
        save_tokenizer(directory, tokenizer=tokenizer, own=own_tokenizer, source=origin)
        _write_configs(directory, *configs, origin)
    else:
        for _ in values:  # takes part in gathering what other processes hold
            pass
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("jrlhf save_pretrained")
    return directory


def _configs(
    net: AnyNet,
    source: Source | None,
    tokenizer: PreTrainedTokenizerBase | None,
    own: PreTrainedTokenizerBase | None,
    dtype: str,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What config.json and generation_config.json will say; None: there is none of these."""
    causal = net.spec.head == "causal"
    origin, given = ({}, None) if source is None else (source.config, source.generation_config)
    config = writer.export_config(
        config_from_spec(net.spec), origin, classifier=not causal, dtype=dtype
    )
    generation = writer.export_generation_config(given, config) if causal else None
    alone = source is None or source.kind == "config"
    # A checkpoint's own tokenizer has nothing to tell its configs.
    if (found := tokenizer if tokenizer is not None or not alone else own) is not None:
        special_tokens.align(config, generation, found, alone=alone)
    return config, generation


def _write_configs(
    directory: Path,
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    origin: Path | None,
) -> None:
    """The configs, when the weights are there; of an earlier save's no others remain."""
    writer.write_json(directory / "config.json", config)
    if generation is not None:
        writer.write_json(directory / "generation_config.json", generation)
    elif not is_home(directory, origin):
        (directory / "generation_config.json").unlink(missing_ok=True)
    for name in hub.ADAPTER:  # transformers would lay it over the weights
        (directory / name).unlink(missing_ok=True)


def _leaf_order(net: AnyNet) -> list[dict[str, list[tuple[Keys, Weight, At]]]]:
    """The order of the export: {tensor: the leaves it is made of}, one group of leaves at a time.

    A group is one leaf, or the few whose tensors are fused: what lies in host memory together.
    """
    groups: list[dict[str, list[tuple[Keys, Weight, At]]]] = []
    home: dict[str, dict[str, list[tuple[Keys, Weight, At]]]] = {}
    for path in flatten(net.abstract()):
        places = list(places_of(net.spec, path))
        group = next((home[name] for _, name, _ in places if name in home), None)
        if group is None:
            group = {}
            groups.append(group)
        for row, name, at in places:
            group.setdefault(name, []).append((path, row, at))
            home[name] = group
    return groups


def _tensors(net: AnyNet, itemsize: int) -> list[writer.Tensor]:
    return [
        writer.Tensor(name, itemsize * int(np.prod(parts[0][1].hf_shape)))
        for group in _leaf_order(net)
        for name, parts in group.items()
    ]


def _export(net: AnyNet, params: Params, dtype: np.dtype[Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor in the checkpoint's layout."""
    leaves = flatten(params)
    for group in _leaf_order(net):
        held: dict[Keys, np.ndarray] = {}
        for name, parts in group.items():
            for path, _, _ in parts:
                if path not in held:
                    held[path] = to_host(leaves[path])
            yield name, _cast(_assemble(held, parts), dtype, name)


def _assemble(held: Mapping[Keys, np.ndarray], parts: list[tuple[Keys, Weight, At]]) -> np.ndarray:
    """One tensor of the checkpoint from the leaves it is made of."""
    path, row, at = parts[0]
    if row.part is None:
        return row.to_hf(held[path][at])
    whole = np.empty(row.hf_shape, held[path].dtype)
    for path, row, at in parts:
        assert row.part is not None
        row.part.put(whole, row.to_hf(held[path][at]))
    return whole


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
