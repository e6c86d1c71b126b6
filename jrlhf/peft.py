"""Adapters with the calls that PEFT's users write.

from jrlhf.peft import LoraConfig, PeftModel, get_peft_model

model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
model.save_pretrained("out")                        # adapter_config.json, adapter_model.safetensors
model = PeftModel.from_pretrained(base, "out")      # also of what PEFT saved
model.load_adapter("other", adapter_name="other"); model.set_adapter("other")
with model.disable_adapter(): ...                   # the base
plain = model.merge_and_unload()                    # a model of its own; the base is not touched
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jrlhf.auto import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from jrlhf.errors import ConfigError, ModelError, suggest
from jrlhf.model import Model
from jrlhf.models import hub
from jrlhf.models.adapter import abstract, check_base, read_adapter
from jrlhf.models.arguments import SAVE_ADAPTER, check
from jrlhf.models.build import Net, Params, linear_maps
from jrlhf.models.build_encoder import AnyNet
from jrlhf.models.hf.writer import write_json
from jrlhf.models.load import flatten
from jrlhf.models.lora import files, tables, tree
from jrlhf.models.lora.config import (
    CONFIG_FILE,
    LoraConfig,
    as_config,
    base_of,
    written_config,
)
from jrlhf.models.lora.plan import Adapter, names_of
from jrlhf.models.quantize import dense, holds_quantized
from jrlhf.models.save import to_host
from jrlhf.models.tokenizer_files import save_tokenizer
from jrlhf.sharding.place import params_shardings

__all__ = ["AutoPeftModelForCausalLM", "AutoPeftModelForSequenceClassification", "LoraConfig",
           "PeftModel", "get_peft_model"]  # fmt: skip


def get_peft_model(
    model: Model, peft_config: LoraConfig, adapter_name: str = "default", *, seed: int = 0
) -> PeftModel:
    """A model with a new adapter on a base; unlike in PEFT the base itself stays as it is.

    Args:
        model: the base. Its arrays are shared, not copied.
        peft_config: what to adapt; PEFT's own `LoraConfig` is taken too.
        adapter_name: of the adapter.
        seed: of the first values, which depend on it and the modules' names alone.

    Raises:
        ConfigError: modules that the base does not have; a base with frozen layers.
    """
    adapted = PeftModel(model)
    adapted.add_adapter(adapter_name, peft_config, seed=seed)
    adapted.set_adapter(adapter_name)
    return adapted


class PeftModel(Model):
    """A base with adapters beside it.

    Attributes:
        peft_config: every adapter's config, by name.
        is_trainable: whether trainers may train the active adapters.
        base_is_reference: whether the base is what training starts from (B A = 0): trainers then
            take it, with the adapters off, as their reference.
    """

    net: Net

    def __init__(self, model: Model) -> None:
        if isinstance(model, PeftModel):
            raise ModelError("This model has adapters already: use its add_adapter, or merge them.")
        super().__init__(
            check_base(model.net, model.name_or_path),
            {**model.params, tree.KEY: {}},
            source=model.source,
            mesh=model.mesh,
            name_or_path=model.name_or_path,
            tokenizer=model._tokenizer,
        )
        self.peft_config: dict[str, LoraConfig] = {}
        self.is_trainable, self.base_is_reference = True, False
        self._plans: dict[str, Adapter] = {}
        self._own_tables = False  # whether an adapter's file brought the base's

    @classmethod
    def from_pretrained(
        cls,
        model: Model,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> PeftModel:
        """A base with the adapter of a directory or hub id, as PEFT or jrlhf saved it.

        Args:
            model: the base.
            model_id: where adapter_config.json and adapter_model.safetensors are.
            adapter_name: what to call it.
            is_trainable: True where training goes on with it.

        Raises:
            MissingFileError: one of the files is absent.
            MissingWeightError: the adapter is of another base; everything that differs is listed.
            UnsupportedFieldError: not LoRA, or a variant that is not implemented.
        """
        adapted = cls(model)
        adapted.load_adapter(model_id, adapter_name, is_trainable=is_trainable)
        adapted.set_adapter(adapter_name)
        return adapted

    # -------------------------------------------------------------- several adapters

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters; [] while they are disabled."""
        return [adapter.name for adapter in self.net.adapters]

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig, *, seed: int = 0) -> None:
        """Adds a new adapter; it acts once `set_adapter` chooses it."""
        chosen = as_config(peft_config)
        self._unknown(adapter_name)
        plan = self.net.adapter(chosen, name=adapter_name)
        params = self.params
        layout = self._layout(plan)

        def draw(params: Params, key: jax.Array) -> Params:
            return tree.init(plan, params, key)

        own = jax.jit(draw, out_shardings=layout)(params, jax.random.key(seed))
        self._hold(adapter_name, chosen, plan, own)

    def load_adapter(
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False
    ) -> None:
        """Adds the adapter of a directory or hub id; see `from_pretrained`."""
        self._unknown(adapter_name)
        chosen, plan, values, beside = read_adapter(self.net, model_id, adapter_name)
        own = jax.device_put(values, self._layout(plan))
        for path, table in beside.items():
            self._lay(path, table)
        self.is_trainable = is_trainable
        self._hold(adapter_name, chosen, plan, own)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Chooses the active adapter, or several, whose effects are added."""
        if not isinstance(adapter_name, str | Sequence):
            raise ConfigError(f"set_adapter takes a name or several, got {adapter_name!r}.")
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._known(name)
        self.net = dataclasses.replace(self.net, adapters=tuple(self._plans[n] for n in names))

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter; if it was active, so is none of its kind any more."""
        self._known(adapter_name)
        params = self.params
        held = {name: own for name, own in params[tree.KEY].items() if name != adapter_name}
        self.params = {**params, tree.KEY: held}
        del self._plans[adapter_name], self.peft_config[adapter_name]
        left = tuple(a for a in self.net.adapters if a.name != adapter_name)
        self.net = dataclasses.replace(self.net, adapters=left)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """In this block the model is its base."""
        active = self.net
        self.net = active.base
        try:
            yield
        finally:
            self.net = active

    def resize_token_embeddings(self, *_: Any, **__: Any) -> jax.Array:
        """Refused: an adapter belongs to the base that it was made for.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "Resize the base before it gets an adapter: model.resize_token_embeddings(...), then"
            " get_peft_model."
        )

    # -------------------------------------------------------------- out of it again

    def get_base_model(self) -> Model:
        """The base, sharing its arrays."""
        params = {name: value for name, value in self.params.items() if name != tree.KEY}
        return Model._with(self, self.net.base, params)

    unload = get_base_model

    def merge_and_unload(self) -> Model:
        """A plain model with the active adapters in its weights; the base is not touched.

        Only changed weights are new arrays (float32, added in float32); the others are shared.
        """
        base = self.get_base_model()
        paths = tree.changed_paths(self.net.adapters)
        adapters, names = self.net.adapters, set(self.active_adapters)
        held = {name: own for name, own in self.params[tree.KEY].items() if name in names}
        layout = None
        if self.mesh is not None:
            placed = flatten(params_shardings(base.net, base.params, self.mesh))
            layout = [placed[path] for path in paths]

        def changed(params: Params) -> list[jax.Array]:
            whole = tree.merged(params, adapters)
            return [tree.get(whole, path) for path in paths]

        new = jax.jit(changed, out_shardings=layout)({**base.params, tree.KEY: held})
        params = base.params
        for path, leaf in zip(paths, new, strict=True):
            params = tree.with_entry(params, path, leaf)
        base.params = jax.jit(dense)(params) if holds_quantized(params) else params
        return base

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        dtype: str = "float32",
        selected_adapters: Sequence[str] | None = None,
        tokenizer: Any = None,
        **others: Any,
    ) -> None:
        """Writes adapters as PEFT does: "default" here, others in directories of their names.

        Args:
            save_directory: made if absent.
            dtype: type of the saved weights.
            selected_adapters: names; None: all.
            tokenizer: written beside the adapter.
        """
        known = ("dtype", "selected_adapters", "tokenizer")
        check("save_pretrained", others, SAVE_ADAPTER, known)
        directory = hub.target(save_directory)
        rows = tree.weights(self.net.spec)
        for name in self._plans if selected_adapters is None else selected_adapters:
            self._known(name)
            leaves = {
                path: to_host(leaf) for path, leaf in flatten(self.params[tree.KEY][name]).items()
            }
            beside = self._tables(self._plans[name])
            if jax.process_index() != 0:
                continue
            target = directory if name == "default" else directory / name
            files.write(target, leaves, self._plans[name], rows, beside=beside, dtype=dtype)
            wanted = names_of(self._plans[name], linear_maps(self.net.spec))
            chosen, base = self.peft_config[name], self.name_or_path
            spec = self.net.spec
            config = written_config(chosen, spec=spec, base=base, target_modules=wanted)
            write_json(target / CONFIG_FILE, config)
        if tokenizer is not None and jax.process_index() == 0:
            origin = None if self.source is None else self.source.path
            save_tokenizer(directory, tokenizer=tokenizer, source=origin)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("jrlhf save_pretrained")

    # -------------------------------------------------------------- numbers

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(parameters of the active adapters, all parameters), counting no padding of ranks."""
        trained = sum(map(self._size, self.net.adapters))
        return trained, super().num_parameters() + trained

    def num_parameters(self, **others: Any) -> int:
        """Parameters of the base and of every adapter."""
        return super().num_parameters(**others) + sum(map(self._size, self._plans.values()))

    def _size(self, plan: Adapter) -> int:
        leaves = flatten(self.params[tree.KEY][plan.name])
        shapes = {path: leaf.shape for path, leaf in leaves.items()}
        # By name: a fused tensor is made of several leaves.
        file = files.tensors(plan, tree.weights(self.net.spec), shapes)
        found = {tensor.name: tensor.row.hf_shape for tensor in file if not tensor.copied}
        return sum(int(np.prod(shape)) for shape in found.values())

    def print_trainable_parameters(self) -> None:
        """Prints the two numbers, as PEFT does."""
        trained, whole = self.get_nb_trainable_parameters()
        share = 100 * trained / whole
        print(  # noqa: T201 (its purpose)
            f"trainable params: {trained:,d} || all params: {whole:,d} || trainable%: {share:.4f}"
        )

    # -------------------------------------------------------------- inside

    def _unknown(self, name: str) -> None:
        if name in self._plans:
            raise ConfigError(f"There is an adapter {name!r} already: choose another name.")

    def _layout(self, plan: Adapter) -> Any:
        """Shardings of an adapter's leaves: with the base's mesh, or on its device."""
        if self.mesh is None:
            one = jax.tree.leaves(self.params)[0].sharding
            return jax.tree.map(lambda _: one, abstract(self.net, plan))
        net = Net(self.net.spec, (plan,))
        held = {tree.KEY: {plan.name: abstract(self.net, plan)}}
        return params_shardings(net, held, self.mesh)[tree.KEY][plan.name]

    def _hold(self, name: str, chosen: LoraConfig, plan: Adapter, own: Params) -> None:
        params = self.params
        self.params = {**params, tree.KEY: {**params[tree.KEY], name: own}}
        self.peft_config[name], self._plans[name] = chosen, plan

    def _lay(self, path: tuple[str, ...], table: np.ndarray) -> None:
        """Puts a table into the base's place; the model that the base came from keeps its own."""
        params, self._own_tables = self.params, True
        old = tree.get(params, path)
        beyond = [(0, whole - size) for whole, size in zip(old.shape, table.shape, strict=True)]
        new = jax.device_put(np.pad(table, beyond).astype(old.dtype), old.sharding)
        self.params = tree.with_entry(params, path, new)

    def _tables(self, plan: Adapter) -> dict[str, np.ndarray]:
        """What of the base its origin does not have: tables that were resized, or came beside."""
        spec, origin = self.net.spec, {} if self.source is None else self.source.config
        if not self._own_tables and origin.get("vocab_size", spec.vocab_size) == spec.vocab_size:
            return {}
        return tables.whole(self.params, tree.weights(spec), tree.tied_head(spec), plan.saved)

    def _known(self, name: str) -> None:
        if name not in self._plans:
            raise ConfigError(
                f"There is no adapter {name!r}; there are {', '.join(self._plans) or 'none'}."
                + suggest(name, self._plans)
            )

    def _whole_net(self) -> Net:
        return Net(self.net.spec, tuple(self._plans.values()))

    def _with(self, net: AnyNet, params: Params) -> PeftModel:
        assert isinstance(net, Net)
        if net.spec.trunk_layers:
            raise ConfigError(
                "num_layers_unfrozen means nothing beside an adapter: leave it at -1."
            )
        changed = PeftModel(Model._with(self, self.net.base, params))
        changed.net, changed.params = net, params
        changed.peft_config, changed._plans = dict(self.peft_config), dict(self._plans)
        changed.is_trainable, changed._own_tables = self.is_trainable, self._own_tables
        changed.base_is_reference = self.base_is_reference
        return changed


class _AutoPeft:
    """Shared by the factories below; never instantiated."""

    _base: Any = AutoModelForCausalLM

    def __init__(self) -> None:
        raise ModelError(f"{type(self).__name__} is a factory: call its from_pretrained.")

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        **options: Any,
    ) -> PeftModel:
        """An adapter's directory together with the base that its config names.

        `options` are those of the base's `from_pretrained`.
        """
        directory = hub.resolve(model_id)
        if base_of(directory) is None:
            raise ModelError(f"{directory} is no adapter directory, or a whole model lies there.")
        model = cls._base.from_pretrained(directory, **options).get_base_model()
        return PeftModel.from_pretrained(model, directory, adapter_name, is_trainable)


class AutoPeftModelForCausalLM(_AutoPeft):
    """Language models with an adapter."""


class AutoPeftModelForSequenceClassification(_AutoPeft):
    """Classifiers and reward models with an adapter."""

    _base = AutoModelForSequenceClassification
