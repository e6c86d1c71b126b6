"""The public model classes, with transformers' names and manners.

model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
model(input_ids).logits
model.generate(input_ids, max_new_tokens=20)      # prompt + completion
model.save_pretrained("out")                      # transformers loads it
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.errors import ConfigError, ModelError, suggest
from jrlhf.models import hub
from jrlhf.models.build import Net, Params, linear_maps
from jrlhf.models.build_encoder import AnyNet, EncoderNet, net_of
from jrlhf.models.families import config_from_spec, spec_from_config
from jrlhf.models.halves import restack
from jrlhf.models.load import Source, load_pretrained, save_pretrained
from jrlhf.models.lora.config import base_of
from jrlhf.models.quantize import asked_for, quantize
from jrlhf.models.tokenizer import load_tokenizer
from jrlhf.rollout.encode import classify_like_transformers
from jrlhf.rollout.generate import generate_like_transformers
from jrlhf.sharding.mesh import make_mesh
from jrlhf.sharding.place import params_shardings
from jrlhf.sharding.rules import activate

# Arguments of transformers' from_pretrained that have another name here, or none.
_ELSEWHERE = {
    "device_map": "give mesh={'fsdp': 4} instead",
    "trust_remote_code": "jrlhf never runs code from a checkpoint",
    "quantization_config": "give load_in_8bit=True (int8) or load_in_4bit=True (nf4)",
    "attn_implementation": "the attention kernel follows the platform",
}


_OPTIONS = ("dtype", "mesh", "num_layers_unfrozen", "remat", "seed", "param_dtype",
            "load_in_8bit", "load_in_4bit")  # fmt: skip


class ModelOutput(NamedTuple):
    """What a model call returns.

    Attributes:
        logits: float32 [b s v] of a language model, [b num_labels] of a classifier,
            [b s num_labels] of a token classifier.
        value: float32 [b s] of a value head, else None.
    """

    logits: jax.Array
    value: jax.Array | None = None


class Model:
    """A model on its devices: what `from_pretrained` returns and every trainer takes.

    Attributes:
        net: its pure functions.
        source: the files it came from; None for random weights.
        mesh: the mesh that its parameters lie on; None: one device.
        name_or_path: what it was loaded by.
    """

    def __init__(
        self,
        net: AnyNet,
        params: Params,
        *,
        source: Source | None = None,
        mesh: jax.sharding.Mesh | None = None,
        name_or_path: str = "model",
        tokenizer: Any = None,
    ) -> None:
        self.net, self.source, self.mesh = net, source, mesh
        self.name_or_path = name_or_path
        self._params: Params | Callable[[], Params] = params
        self._tokenizer = tokenizer

    @property
    def params(self) -> Params:
        """The parameters; during and after training the trained ones."""
        return self._params() if callable(self._params) else self._params

    @params.setter
    def params(self, value: Params | Callable[[], Params]) -> None:
        self._params = value

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of its files.

        Raises:
            ModelError: it was made from a config and has none.
        """
        if self._tokenizer is None:
            if self.source is None:
                raise ModelError(
                    "This model has no files and so no tokenizer: pass processing_class."
                )
            self._tokenizer = load_tokenizer(self.source.path)
        return self._tokenizer

    @property
    def config(self) -> Any:
        """A transformers config with this model's sizes."""
        from transformers import AutoConfig

        origin = {} if self.source is None else dict(self.source.config)
        values = {**origin, **config_from_spec(self.net.spec)}
        return AutoConfig.for_model(values.pop("model_type"), **values)

    @property
    def decoder(self) -> Net:
        """The net of a model that can write; ModelError if it is an encoder."""
        if isinstance(self.net, EncoderNet):
            raise ModelError(f"{self.name_or_path} is an encoder: it scores texts, it writes none.")
        return self.net

    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        token_type_ids: Any = None,
    ) -> ModelOutput:
        """Runs the model.

        Args:
            input_ids: [b s], padded on either side.
            attention_mask: 1 for real tokens, [b s]; None: all are real.
            position_ids: [b s], as transformers counts them; None: over the real tokens.
            token_type_ids: [b s], of encoders that have a table of them; None: all 0.

        Raises:
            ModelError: inputs of another shape, or out of the model's range.
        """
        ids = jnp.asarray(np.asarray(input_ids), jnp.int32)
        if ids.ndim != 2:
            raise ModelError(f"input_ids must be [rows, tokens], got shape {ids.shape}.")
        mask = jnp.ones_like(ids) if attention_mask is None else _ints(attention_mask)
        if isinstance(self.net, EncoderNet):
            return ModelOutput(
                classify_like_transformers(
                    self.net, self.params, ids, mask, position_ids, token_type_ids, mesh=self.mesh
                )
            )
        if position_ids is None:
            positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        else:
            positions = _ints(position_ids)
        return _forward(self.net, self.params, ids, mask, positions, self.mesh)

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | list[int] | None = None,
        seed: int = 0,
        *,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        min_new_tokens: int = 0,
        pad_token_id: int | None = None,
    ) -> np.ndarray:
        """Samples or decodes greedily; returns prompt and completion, padded at the end.

        `eos_token_id=None` takes the model's own, as transformers does; -1 never stops early. The
        other arguments are those of `rollout.generate.generate_like_transformers`.
        """
        if eos_token_id is None:
            eos_token_id = self.eos_token_ids or None
        elif eos_token_id == -1:
            eos_token_id = None
        return generate_like_transformers(
            self.decoder,
            self.params,
            np.asarray(input_ids),
            None if attention_mask is None else np.asarray(attention_mask),
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            min_new_tokens=min_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            seed=seed,
            mesh=self.mesh,
        )

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end a generation: generation_config.json's, else config.json's."""
        if self.source is None:
            return []
        found = (self.source.generation_config or {}).get("eos_token_id")
        found = self.source.config.get("eos_token_id") if found is None else found
        return [] if found is None else [int(i) for i in np.atleast_1d(found)]

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        dtype: str = "float32",
        max_shard_size: str | int = "5GB",
        tokenizer: Any = None,
    ) -> None:
        """Writes safetensors, configs and tokenizer; transformers loads the same weights back."""
        save_pretrained(
            save_directory,
            self.net,
            self.params,
            source=self.source,
            tokenizer=tokenizer or self._tokenizer,
            dtype=dtype,
            max_shard_size=max_shard_size,
        )

    def to_mesh(self, mesh: jax.sharding.Mesh) -> None:
        """Lays the parameters out over a mesh."""
        net = self._whole_net()
        self.params = jax.device_put(self.params, params_shardings(net, self.params, mesh))
        self.mesh = mesh

    def _whole_net(self) -> AnyNet:
        """The net of every parameter that is held."""
        return self.net

    def _with(self, net: AnyNet, params: Params) -> Model:
        """The same model with another net and its parameters."""
        return Model(
            net, params, source=self.source, mesh=self.mesh, name_or_path=self.name_or_path,
            tokenizer=self._tokenizer,
        )  # fmt: skip

    def respec(self, *, seed: int = 0, **changes: Any) -> Model:
        """The same weights under a spec that differs in dtype, remat, trunk or value head.

        A value head that is new is drawn with `seed`.
        """
        spec = self.net.spec.replace(**changes)
        if spec == self.net.spec:
            return self
        net = self.net.of(spec)
        params = dict(self.params)
        if spec.trunk_layers != self.net.spec.trunk_layers:
            params = restack(params, spec.trunk_layers)
        if spec.value_head and "value" not in params:
            params["value"] = jax.jit(lambda key: net.init(key)["value"])(jax.random.key(seed))
        if not spec.value_head:
            params.pop("value", None)
        changed = self._with(net, params)
        if self.mesh is not None:
            changed.to_mesh(self.mesh)
        return changed


def _ints(x: Any) -> jax.Array:
    return jnp.asarray(np.asarray(x), jnp.int32)


@functools.partial(jax.jit, static_argnames=("net", "mesh"))
def _forward(
    net: Net,
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    positions: jax.Array,
    mesh: jax.sharding.Mesh | None,
) -> ModelOutput:
    with activate(mesh):
        hidden = net.hidden(params, ids, segments=mask, positions=positions)
        if net.spec.head == "classifier":
            # The last real token stands at the last 1 of the mask, wherever the padding is.
            ends = ids.shape[1] - jnp.argmax(mask[:, ::-1], axis=1)
            return ModelOutput(net.scores(params, hidden, ends))
        if net.spec.head == "tokens":
            return ModelOutput(net.token_scores(params, hidden))
        logits = net.logits(params, hidden)
        return ModelOutput(logits, net.values(params, hidden) if net.spec.value_head else None)


class _Auto:
    """Shared by the three factories; never instantiated."""

    _choices: Mapping[str, Any] = {}
    _extra: tuple[str, ...] = ()

    def __init__(self) -> None:
        raise ModelError(f"{type(self).__name__} is a factory: call its from_pretrained.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: str = "float32",
        mesh: Any = None,
        num_layers_unfrozen: int = -1,
        remat: str = "none",
        seed: int = 0,
        param_dtype: str = "float32",
        **more: Any,
    ) -> Model:
        """Loads a hub id, a Hugging Face directory, a GGUF file or a glassllm directory.

        Args:
            pretrained_model_name_or_path: what to load.
            dtype: compute type, "float32" or "bfloat16".
            mesh: a mesh, or its sizes ({"fsdp": 4} or "fsdp=4"); None: one device.
            num_layers_unfrozen: upper layers that are trained; -1: all.
            remat: policy of recomputation in the backward pass.
            seed: of heads that the checkpoint does not have.
            param_dtype: type in which the weights are kept; bfloat16 is for what is not trained.
            **more: `num_labels` (classifiers); `torch_dtype`, an old name of `dtype`;
                `load_in_8bit` or `load_in_4bit`: a base that is frozen below an adapter.

        An adapter's directory gives a `jrlhf.peft.PeftModel`: the base that it names, adapted.

        Raises:
            MissingFileError, UnsupportedModelError, MissingWeightError, MeshError, ConfigError
        """
        dtype = _dtype(more.pop("torch_dtype", dtype))
        kind = asked_for(more)
        choices = {**cls._choices, **{k: more.pop(k) for k in cls._extra if k in more}}
        for name in more:
            if name in _ELSEWHERE:
                raise ConfigError(f"from_pretrained: {name} is not supported: {_ELSEWHERE[name]}.")
            known = [*_OPTIONS, *cls._extra]
            raise ConfigError(f"from_pretrained has no argument {name!r}.{suggest(name, known)}")
        placed, adapter = as_mesh(mesh), None
        base = base_of(hub.resolve(pretrained_model_name_or_path))
        if base is not None:
            adapter, pretrained_model_name_or_path = pretrained_model_name_or_path, base
        net, params, source = load_pretrained(
            pretrained_model_name_or_path,
            dtype=dtype,
            param_dtype=_dtype(param_dtype),
            num_layers_unfrozen=num_layers_unfrozen,
            remat=remat,
            shardings=None if placed is None else functools.partial(params_shardings, mesh=placed),
            key=jax.random.key(seed),
            **choices,
        )
        params = quantize(params, linear_maps(net.spec), kind, dtype=dtype) if kind else params
        name = str(pretrained_model_name_or_path)
        model = Model(net, params, source=source, mesh=placed, name_or_path=name)
        return model if adapter is None else _with_adapter(model, adapter)

    @classmethod
    def from_config(
        cls, config: Any, *, seed: int = 0, mesh: Any = None, tokenizer: Any = None, **choices: Any
    ) -> Model:
        """A model with random weights from a transformers config or a config.json's dict."""
        values = dict(config) if isinstance(config, Mapping) else config.to_dict()
        net = net_of(spec_from_config(values, **{**cls._choices, **choices}))
        placed = as_mesh(mesh)
        shardings = None if placed is None else params_shardings(net, net.abstract(), placed)
        params = jax.jit(net.init, out_shardings=shardings)(jax.random.key(seed))
        return Model(net, params, mesh=placed, name_or_path="random", tokenizer=tokenizer)


def _layout(net: AnyNet, abstract: Params, *, mesh: jax.sharding.Mesh) -> Any:
    return params_shardings(net, abstract, mesh)


def _with_adapter(model: Model, directory: str | Path) -> Model:
    from jrlhf.peft import PeftModel

    return PeftModel.from_pretrained(model, directory, is_trainable=True)


def as_mesh(mesh: Any) -> jax.sharding.Mesh | None:
    """A mesh as it is, sizes as a mesh, None as None."""
    return mesh if mesh is None or isinstance(mesh, jax.sharding.Mesh) else make_mesh(mesh)


def _dtype(value: Any) -> str:
    """ "float32", jnp.float32, torch.float32 or np.dtype -> "float32"."""
    name = getattr(value, "__name__", None) or str(value)
    name = {"auto": "float32", "bf16": "bfloat16", "fp32": "float32"}.get(
        name.removeprefix("torch."), name.removeprefix("torch.")
    )
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype must be float32 or bfloat16, got {value!r}.")
    return name


class AutoModelForCausalLM(_Auto):
    """Language models."""

    _choices = {"head": "causal"}


class AutoModelForCausalLMWithValueHead(_Auto):
    """Language models with a scalar value per token, for PPO."""

    _choices = {"head": "causal", "value_head": True}


class AutoModelForTokenClassification(_Auto):
    """Token classifiers: `num_labels` scores of every token."""

    _choices = {"head": "tokens"}
    _extra = ("num_labels",)


class AutoModelForSequenceClassification(_Auto):
    """Classifiers and reward models (num_labels=1): decoders at the last real token, encoders."""

    _choices = {"head": "classifier"}
    _extra = ("num_labels",)
