"""The public model classes, with transformers' names and manners.

model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
model(input_ids).logits
model.generate(input_ids, max_new_tokens=20)      # prompt + completion
model.save_pretrained("out")                      # transformers loads it
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jrlhf.errors import ConfigError, ModelError, suggest
from jrlhf.model import Model as Model
from jrlhf.model import ModelOutput as ModelOutput
from jrlhf.models import arguments, hub
from jrlhf.models.adapter import read_adapter, vocabulary_of
from jrlhf.models.attend import choose_for, named
from jrlhf.models.build_encoder import AnyNet, net_of
from jrlhf.models.families import CHOICES, spec_from_config
from jrlhf.models.load import Keep, Source, load_pretrained
from jrlhf.models.lora.config import base_of
from jrlhf.models.quantize import asked_for, quantizer
from jrlhf.ops.layout import platform_of
from jrlhf.sharding.mesh import make_mesh
from jrlhf.sharding.place import params_shardings

_OPTIONS = ("dtype", "mesh", "num_layers_unfrozen", "remat", "seed", "param_dtype",
            "load_in_8bit", "load_in_4bit", "attn_implementation", "revision")  # fmt: skip


class _Auto:
    """Shared by the three factories; never instantiated."""

    _choices: Mapping[str, Any] = {}
    _extra: tuple[str, ...] = ()
    _of_files: tuple[str, ...] = ("pad_vocab_to_multiple_of",)

    def __init__(self) -> None:
        raise ModelError(f"{type(self).__name__} is a factory: call its from_pretrained.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *by_place: Any,
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
            **more: `num_labels`, `ignore_mismatched_sizes` (classifiers; a head of another size is
                drawn anew); `torch_dtype`, an old name of `dtype`; `load_in_8bit` or
                `load_in_4bit`: a base that is frozen below an adapter; `attn_implementation`:
                "auto" (the platform's kernel), "xla", "cudnn", "splash", or transformers' names;
                `revision`: a branch, tag or commit of a model on the hub;
                `pad_vocab_to_multiple_of`: rounds the vocabulary up so that a mesh divides it, with
                rows that are no tokens.

        An adapter's directory gives a `jrlhf.peft.PeftModel`: the base that it names, adapted.

        Raises:
            MissingFileError, UnsupportedModelError, MissingWeightError, MeshError, ConfigError
        """
        _refuse(by_place)
        dtype = _either_dtype(dtype, more)
        kind, attention = asked_for(more), named(more.pop("attn_implementation", None))
        choices, placed = cls._taken(more), as_mesh(mesh)
        name, adapter = pretrained_model_name_or_path, None
        found = hub.resolve(name, revision=more.get("revision"))
        if (base := base_of(found)) is not None:
            adapter, name, found = found, base, hub.resolve(base)
        net, params, source = load_pretrained(
            found, dtype=dtype, param_dtype=_dtype(param_dtype),
            num_layers_unfrozen=num_layers_unfrozen, remat=remat,
            attention=attention,
            platform=_platform(placed),
            shardings=None if placed is None else functools.partial(params_shardings, mesh=placed),
            key=_key(seed),
            keeper=functools.partial(_keeper, kind=kind, adapter=adapter),
            **choices,
        )  # fmt: skip
        if kind is not None and placed is not None:  # the compiler may have left codes whole
            params = jax.device_put(params, params_shardings(net, params, placed))
        model = Model(net, params, source=source, mesh=placed, name_or_path=str(name))
        multiple = choices.get("pad_vocab_to_multiple_of", 1)
        return model if adapter is None else _with_adapter(model, adapter, multiple)

    @classmethod
    def _taken(cls, more: dict[str, Any]) -> dict[str, Any]:
        """What is left of `from_pretrained`'s arguments, for `load_pretrained`."""
        own = (*cls._extra, *cls._of_files)
        others = {key: value for key, value in more.items() if key not in (*own, "revision")}
        known = [*_OPTIONS, *own]
        arguments.check("from_pretrained", others, arguments.FROM_PRETRAINED, known)
        if not isinstance(new := more.get("ignore_mismatched_sizes", False), bool | None):
            raise ConfigError(f"ignore_mismatched_sizes must be True or False, got {new!r}.")
        return {**cls._choices, **{key: value for key, value in more.items() if key in own}}

    @classmethod
    def from_config(
        cls, config: Any, *, seed: int = 0, mesh: Any = None, tokenizer: Any = None,
        attn_implementation: str | None = None, **choices: Any,
    ) -> Model:  # fmt: skip
        """A model with random weights from a transformers config or a config.json's dict.

        Args:
            config: what to build.
            seed, mesh, attn_implementation: as of `from_pretrained`.
            tokenizer: of its texts; a config has none.
            **choices: `dtype` (or `torch_dtype`), `remat`, `num_labels`.

        Raises:
            UnsupportedModelError, ModelError, MeshError, ConfigError
        """
        if not isinstance(config, Mapping) and not callable(getattr(config, "to_dict", None)):
            raise ConfigError(
                f"from_config takes a transformers config or a config.json's dict, got {config!r}."
            )
        values = dict(config) if isinstance(config, Mapping) else config.to_dict()
        placed, key = as_mesh(mesh), _key(seed)
        choices["dtype"] = _either_dtype(choices.get("dtype", "float32"), choices)
        known = ("dtype", "remat", *cls._extra)
        if unknown := sorted(choices.keys() - {*known, *CHOICES}):
            hint = suggest(unknown[0], [*known, "seed", "mesh", "tokenizer", "attn_implementation"])
            raise ConfigError(f"from_config has no argument {unknown[0]!r}.{hint}")
        spec = spec_from_config(values, **{**cls._choices, **choices})
        net = net_of(choose_for(spec, named(attn_implementation), _platform(placed)))
        shardings = None if placed is None else params_shardings(net, net.abstract(), placed)
        params = jax.jit(net.init, out_shardings=shardings)(key)
        source = Source("config", None, values)
        return Model(
            net, params, source=source, mesh=placed, name_or_path="random", tokenizer=tokenizer
        )


def _platform(mesh: jax.sharding.Mesh | None) -> str | None:
    return None if mesh is None else platform_of(mesh.devices.flat[0])


def _refuse(by_place: tuple[Any, ...]) -> None:
    if by_place:
        raise ConfigError(
            "from_pretrained takes one argument by place, the model; name the others. A config is"
            f" not needed (got {type(by_place[0]).__name__}): config.json decides what a model is."
        )


def _keeper(net: AnyNet, *, kind: str | None, adapter: str | Path | None) -> Keep:
    """What becomes of each leaf; before the first is read, whether the adapter fits."""
    if adapter is not None:
        size = vocabulary_of(net, Path(adapter))
        read_adapter(net.of(net.spec.replace(vocab_size=size, vocab_padding=0)), adapter)
    return (lambda path, leaf: leaf) if kind is None else quantizer(net.spec, kind)


def _with_adapter(model: Model, directory: str | Path, multiple: int) -> Model:
    """The base with the adapter; where its tokens are more, it is given room for them."""
    from jrlhf.peft import PeftModel

    size = vocabulary_of(model.net, Path(directory))
    if size != model.net.spec.vocab_size:
        model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    return PeftModel.from_pretrained(model, directory, is_trainable=True)


def as_mesh(mesh: Any) -> jax.sharding.Mesh | None:
    """A mesh as it is, sizes as a mesh, None as None."""
    return mesh if mesh is None or isinstance(mesh, jax.sharding.Mesh) else make_mesh(mesh)


def _key(seed: Any) -> jax.Array:
    if not isinstance(seed, int) or isinstance(seed, bool) or abs(seed) >= 2**32:
        raise ConfigError(f"seed must be a whole number below 2**32, got {seed!r}.")
    return jax.random.key(seed)


def _either_dtype(dtype: Any, more: dict[str, Any]) -> str:
    """`dtype`, or `torch_dtype` out of the other arguments: its old name."""
    old = more.pop("torch_dtype", None)
    if old is None:
        return _dtype(dtype)
    if _dtype(dtype) not in ("float32", _dtype(old)):
        raise ConfigError(f"dtype={dtype!r} and torch_dtype={old!r} are both given: leave one out.")
    return _dtype(old)


def _dtype(value: Any) -> str:
    """ "float32", jnp.float32, torch.float32 or np.dtype -> "float32"."""
    value = "auto" if value is None else value
    name = getattr(value, "__name__", None) or str(value)
    name = {"auto": "float32", "bf16": "bfloat16", "fp32": "float32"}.get(
        name.removeprefix("torch."), name.removeprefix("torch.")
    )
    if name in ("float16", "fp16", "half"):
        raise ConfigError(f"dtype={value!r} needs loss scaling: give bfloat16, of the same size.")
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
    _of_files = (*_Auto._of_files, "ignore_mismatched_sizes")


class AutoModelForSequenceClassification(_Auto):
    """Classifiers and reward models (num_labels=1): decoders at the last real token, encoders."""

    _choices = {"head": "classifier"}
    _extra = ("num_labels",)
    _of_files = (*_Auto._of_files, "ignore_mismatched_sizes")
