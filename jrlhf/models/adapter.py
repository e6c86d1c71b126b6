"""An adapter's files and the base that they shall fit, which need not be loaded yet."""

from __future__ import annotations

from pathlib import Path

from jrlhf.errors import ConfigError, ModelError
from jrlhf.models import hub
from jrlhf.models.build import Net, Params
from jrlhf.models.build_encoder import AnyNet, EncoderNet
from jrlhf.models.load import flatten, nest
from jrlhf.models.lora import files, tree
from jrlhf.models.lora.config import LoraConfig, read_config
from jrlhf.models.lora.plan import Adapter


def read_adapter(
    net: AnyNet, model_id: str | Path, adapter_name: str = "default"
) -> tuple[LoraConfig, Adapter, Params]:
    """The adapter of a directory or hub id: its config, its plan, and its values on the host.

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
    return chosen, plan, nest(files.read(directory, plan, tree.weights(net.spec), shapes))


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
