"""An adapter's files and the base that they shall fit, which need not be loaded yet."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jrlhf.errors import ConfigError, ModelError
from jrlhf.models import hub
from jrlhf.models.build import Net, Params
from jrlhf.models.build_encoder import AnyNet, EncoderNet
from jrlhf.models.load import Keys, flatten, nest
from jrlhf.models.lora import files, tables, tree
from jrlhf.models.lora.config import LoraConfig, read_config
from jrlhf.models.lora.plan import Adapter


def vocabulary_of(net: AnyNet, directory: Path) -> int:
    """How many tokens the base of an adapter has: the net's, unless its file holds other tables."""
    found = tables.vocabulary_of(directory, tree.weights(net.spec))
    return net.spec.vocab_size if found is None else found


def read_adapter(
    net: AnyNet, model_id: str | Path, adapter_name: str = "default"
) -> tuple[LoraConfig, Adapter, Params, dict[Keys, np.ndarray]]:
    """The adapter of a directory or hub id: its config, its plan, and its values on the host.

    Last the base's embedding tables, where PEFT laid them beside an adapter.

    Args:
        net: the base that it shall fit.
        model_id: where it is.
        adapter_name: what to call it.

    Raises:
        MissingFileError, MissingWeightError, UnsupportedFieldError: see PeftModel.from_pretrained.
    """
    base = check_base(net, "this model").base
    directory = hub.resolve(model_id)
    chosen = read_config(directory)
    plan = base.adapter(chosen, name=adapter_name, strict=False)
    shapes = {path: leaf.shape for path, leaf in flatten(abstract(base, plan)).items()}
    weights, tied = tree.weights(net.spec), tree.tied_head(base.spec)
    own, beside = files.read(directory, plan, weights, shapes, tied)
    return chosen, plan, nest(own), beside


def check_base(net: AnyNet, name: str) -> Net:
    """The net, if it can have adapters.

    Raises:
        ModelError: it is an encoder.
        ConfigError: it has frozen layers.
    """
    if isinstance(net, EncoderNet):
        raise ModelError(f"{name} is an encoder: adapters are for decoders.")
    if net.spec.trunk_layers:
        raise ConfigError(
            "An adapter leaves the whole base frozen, so num_layers_unfrozen means nothing "
            "beside it: leave it at -1. layers_to_transform chooses the layers to adapt."
        )
    return net


def abstract(net: Net, plan: Adapter) -> Params:
    """Shapes and types of an adapter's leaves."""
    return Net(net.spec, (plan,)).abstract()[tree.KEY][plan.name]
