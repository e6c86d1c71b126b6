"""From files to params on devices, for every format and family; `save` is the way back.

A checkpoint (safetensors, GGUF, glassllm) offers tensors under Hugging Face's names; the family's
weight table says where each lies in our tree; every device reads the part that its sharding wants.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jrlhf.errors import ConfigError, MissingWeightError
from jrlhf.models import attend, hub, vocabulary
from jrlhf.models.build_encoder import AnyNet, net_of
from jrlhf.models.encoder_spec import AnySpec
from jrlhf.models.families import spec_from_config
from jrlhf.models.gguf import GGUFCheckpoint
from jrlhf.models.glassllm import GlassLLMCheckpoint
from jrlhf.models.hf.mxfp4 import open_safetensors
from jrlhf.models.hf.reader import Checkpoint
from jrlhf.models.match import as_tied, match, places_of
from jrlhf.models.pieces import fill

log = logging.getLogger(__name__)
Params = dict[str, Any]
Keys = tuple[str, ...]
Shardings = Callable[[AnyNet, Params], Any]
# What becomes of a leaf, given its path.
Keep = Callable[[Keys, jax.Array], Any]
_READERS: dict[str, Callable[[Path], Checkpoint]] = {
    "hf": open_safetensors,
    "gguf": GGUFCheckpoint,
    "glassllm": GlassLLMCheckpoint,
}
# What families call the number of layers, and how many no model has.
_DEPTHS, _DEEPEST = ("num_hidden_layers", "n_layer", "n_layers"), 10_000


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model came from, and what its files said besides the spec.

    Attributes:
        kind: "hf", "gguf" or "glassllm"; "config" of random weights.
        path: directory or file on this machine; None where there is none.
        config: its config.json, or what that would say.
        generation_config: its generation_config.json, or None.
    """

    kind: str
    path: Path | None
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, found: Checkpoint) -> Source:
        """The origin of what is read from a checkpoint."""
        path = found.path.absolute()  # the directory of work may be another when it is saved
        return cls(found.kind, path, found.config, found.generation_config)


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a local model directory or file of any format; reads no weight yet.

    Raises:
        MissingFileError: the directory holds no model, or a part of it is absent.
        UnsupportedModelError: a file of an unknown kind.
        MissingWeightError: its config describes far more layers than it holds tensors.
    """
    kind, path = hub.kind_of(path)
    found = _READERS[kind](path)
    for key in _DEPTHS:
        layers = found.config.get(key)
        if isinstance(layers, int) and layers > max(_DEEPEST, len(found.shapes)):
            # Said at once: lists with an entry for each of so many would fill the memory.
            raise MissingWeightError(
                f"{path} describes {key}={layers} layers, and holds {len(found.shapes)} tensors."
            )
    return found


def load_pretrained(
    name_or_path: str | Path,
    *,
    head: str = "causal", value_head: bool = False, num_labels: int | None = None,
    dtype: str = "float32",
    param_dtype: str = "float32",
    num_layers_unfrozen: int = -1,
    remat: str = "none",
    attention: str = "auto",
    platform: str | None = None,
    shardings: Shardings | None = None,
    key: jax.Array | None = None,
    pad_vocab_to_multiple_of: int = 1,
    ignore_mismatched_sizes: bool = False,
    keeper: Callable[[AnyNet], Keep] | None = None,
) -> tuple[AnyNet, Params, Source]:  # fmt: skip
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
        attention: the kernel, as `models.attend.named` gives it.
        platform: that of the devices (`models.axes.platform`); None: of this process's.
        shardings: (net, abstract params) -> tree of shardings; one device when None.
        key: randomness for new heads.
        pad_vocab_to_multiple_of: rounds the vocabulary up, with rows that are no tokens.
        ignore_mismatched_sizes: a classifier's head of another size is drawn anew.
        keeper: called with the net before any weight is read; gives what becomes of each leaf.

    Returns:
        The net, its params, and the model's origin (for `save_pretrained`).

    Raises:
        MissingFileError: no such path or hub id.
        UnsupportedModelError: an architecture or flag that is not implemented.
        ConfigError: the kernel does not run on the platform or this model; what `keeper` raises.
        MissingWeightError: one error that lists every missing, unexpected and misshapen tensor.
    """
    checkpoint = open_checkpoint(hub.resolve(name_or_path))
    spec = spec_from_config(checkpoint.config, head=head, value_head=value_head)
    spec = spec.replace(
        dtype=dtype,
        remat=remat,
        trunk_layers=_trunk_layers(num_layers_unfrozen, spec.num_hidden_layers),
        num_labels=spec.num_labels if num_labels is None else num_labels,
        vocab_padding=vocabulary.padding(spec.vocab_size, pad_vocab_to_multiple_of),
    )
    net = net_of(as_tied(checkpoint, attend.choose_for(spec, attention, platform)))
    names, abstract = match(checkpoint, net.spec, new_head=ignore_mismatched_sizes), net.abstract()
    keep = (keeper or _as_it_is)(net)
    leaves = flatten((shardings or _one_device)(net, abstract))
    filled = _fill_all(flatten(abstract), leaves, checkpoint, net.spec, names, param_dtype, keep)
    filled |= _draw(net, [path for path in leaves if path not in filled], leaves, param_dtype, key)
    return net, nest(filled), Source.of(checkpoint)


def _as_it_is(net: AnyNet) -> Keep:
    return lambda path, leaf: leaf


def _one_device(net: AnyNet, abstract: Params) -> Any:
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: one, abstract)


def _fill_all(
    abstract: Mapping[Keys, Any],
    shardings: Mapping[Keys, jax.sharding.Sharding],
    checkpoint: Checkpoint,
    spec: AnySpec,
    names: Mapping[str, str],
    dtype: str,
    keep: Keep,
) -> dict[Keys, Any]:
    """Every leaf that the checkpoint has; `names` are its tensors by our names for them."""
    filled: dict[Keys, Any] = {}
    for path, leaf in abstract.items():
        places = {
            at: (row, names[name]) for row, name, at in places_of(spec, path) if name in names
        }
        if places or leaf.size == 0:
            filled[path] = keep(path, fill(leaf.shape, shardings[path], checkpoint, places, dtype))
    return filled


def _trunk_layers(unfrozen: int, layers: int) -> int:
    if unfrozen == -1:
        return 0
    if not isinstance(unfrozen, int) or isinstance(unfrozen, bool) or not 0 <= unfrozen <= layers:
        raise ConfigError(
            f"num_layers_unfrozen={unfrozen!r}, but the model has {layers} layers; give -1 (train"
            f" everything) or 0 to {layers}."
        )
    return layers - unfrozen


def _draw(
    net: AnyNet, paths: list[Keys], shardings: Mapping[Keys, Any], dtype: str, key: jax.Array | None
) -> dict[Keys, jax.Array]:
    """Initialises the leaves that no checkpoint tensor fills; the rest of `init` is dead code."""
    if not paths:
        return {}
    # Of a value head nobody expects that a checkpoint has one.
    if new := sorted({path[0] for path in paths} - {"value"}):
        log.warning(
            "Not read from the checkpoint, drawn at random: %s. Train before use.", ", ".join(new)
        )

    def draw(key: jax.Array) -> list[jax.Array]:
        leaves = flatten(net.init(key))
        return [leaves[path].astype(dtype) for path in paths]

    key = jax.random.key(0) if key is None else key
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
