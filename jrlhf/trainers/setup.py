"""From what users write to what a run needs: old arguments, models, tokenizers, meshes, sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jrlhf.auto import (
    AutoModelForCausalLM,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSequenceClassification,
)
from jrlhf.config import TrainingConfig, aliases
from jrlhf.errors import ConfigError, ModelError, suggest
from jrlhf.model import Model
from jrlhf.models import hub
from jrlhf.models.build import Net
from jrlhf.models.build_encoder import EncoderNet
from jrlhf.models.halves import partition
from jrlhf.models.lora.config import base_of
from jrlhf.models.tokenizer import load_tokenizer
from jrlhf.sharding.mesh import data_shards, make_mesh
from jrlhf.train.optim import make_optimizer
from jrlhf.train.writers import reporters
from jrlhf.trainers import adapters

# Arguments of TRL's trainers that belong to PyTorch.
_REFUSED = {
    "optimizers": "choose it with the config's optim, learning_rate and lr_scheduler_type",
    "optimizer_cls_and_kwargs": "choose the optimizer with the config's optim",
    "quantization_config": "give model_init_kwargs={'load_in_4bit': True}",
    "data_collator": "rows are padded to one static length; shape them in the dataset",
    "compute_loss_func": "the loss is the algorithm's; see jrlhf.algos",
    "compute_metrics": "metrics are the algorithm's; use callbacks to add your own",
    "preprocess_logits_for_metrics": "logits are never built",
    "model_init": "pass the model",
    "eval_dataset": "the rollouts are the evaluation; compare policies with `jrlhf evaluate`",
}
_OLD = {"tokenizer": "processing_class", "config": "args", "dataset": "train_dataset",
        "policy": "model", "ref_policy": "ref_model"}  # fmt: skip


def modernise(
    face: str, config_class: type, given: dict[str, Any], old: dict[str, Any]
) -> dict[str, Any]:
    """Merges a constructor's old keyword arguments into its present ones.

    Args:
        face: name of the trainer, for messages.
        config_class: its config; fields given to the trainer go there.
        given: the present arguments, with "args".
        old: everything else that was given.

    Returns:
        `given` with renamed arguments filled in and "args" a config.

    Raises:
        ConfigError: an unknown or doubled argument, or one that cannot work here.
    """
    fields = {f.name for f in dataclasses.fields(config_class)} | set(aliases(config_class))
    into_config: dict[str, Any] = {}
    for name, value in old.items():
        new = _OLD.get(name, name)
        if new in given and new != name:
            _warn(f"{face}: {name} is now {new}.")
            if given[new] is not None:
                raise ConfigError(f"{face}: {name} and {new} mean the same; give one of them.")
            given[new] = value
        elif name in fields:
            _warn(f"{face}: {name} belongs into {config_class.__name__}({name}=...).")
            into_config[name] = value
        elif name in _REFUSED:
            if value not in (None, (None, None)):
                raise ConfigError(f"{face}: {name} is not supported: {_REFUSED[name]}.")
        else:
            raise ConfigError(f"{face} has no argument {name!r}.{suggest(name, [*given, *fields])}")
    args = given["args"]
    if args is not None and not isinstance(args, config_class):
        raise ConfigError(
            f"{face}: args must be a {config_class.__name__}, got {type(args).__name__}."
        )
    if args is None:
        args = config_class(**into_config)
    elif into_config:
        args = dataclasses.replace(args, **into_config)  # type: ignore[type-var]
    given["args"] = args
    return given


def _warn(text: str) -> None:
    warnings.warn(text, DeprecationWarning, stacklevel=5)


class Start(NamedTuple):
    """What every face knows once its arguments are read; no weight is loaded yet.

    Attributes:
        args: the config, with an output_dir.
        model: as given: a path, a hub name or a model.
        tokenizer: the policy's (or classifier's).
        mesh: where the run lives.
        context: positions of the model.
        given: the face's arguments, old names translated.
    """

    args: Any
    model: Any
    tokenizer: Any
    mesh: jax.sharding.Mesh
    context: int
    given: dict[str, Any]

    @property
    def max_length(self) -> int:
        """The config's max_length within the context."""
        asked = self.args.max_length
        return self.context if asked is None else min(asked, self.context)

    @property
    def data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed


def start(
    face: str, config_class: type, kind: str, given: dict[str, Any], old: dict[str, Any]
) -> Start:
    """Reads a face's arguments; everything that can be wrong without a model is found here."""
    given = modernise(face, config_class, given, old)
    fallback = getattr(given["args"], "sft_model_path", None)
    model = need(given["model"] or fallback, face, "a model (--model_name_or_path)")
    need(given["train_dataset"], face, "a train_dataset")
    if given.get("peft_config") is not None:
        head = "classifier" if kind == "Reward" else "causal"
        spec = model.net.spec if isinstance(model, Model) else _spec_of(model, head=head)
        given["peft_config"] = adapters.check(
            face, given["args"], model, given["peft_config"], spec
        )
    args = named_output(given["args"], model, kind)
    _check_init_kwargs(args, model, face)
    make_optimizer(args, 1)  # to know the names
    reporters(args.report_to)
    use_compile_cache()
    context = context_length(model)  # before the tokenizer: it says what is no model at all
    tokenizer = tokenizer_for(given["processing_class"], model, face)
    return Start(args, model, tokenizer, mesh_for(args, model), context, given)


def _check_init_kwargs(args: TrainingConfig, model: Any, face: str) -> None:
    given = args.model_init_kwargs or {}
    if given and isinstance(model, Model):
        raise ConfigError(
            f"{face}: model_init_kwargs={given!r} belongs to a model that is given by name; this "
            "one is loaded already: give them to its from_pretrained."
        )
    if "mesh" in given:
        raise ConfigError(f"{face}: model_init_kwargs cannot hold 'mesh'; use the config's mesh.")


def need(value: Any, face: str, name: str) -> Any:
    if value is None:
        raise ConfigError(f"{face} needs {name}.")
    return value


def named_output(args: Any, model: Any, kind: str) -> Any:
    """Gives a config without output_dir TRL's default, "<model>-<kind>"."""
    if args.output_dir is not None:
        return args
    name = model.name_or_path if isinstance(model, Model) else str(model)
    return dataclasses.replace(args, output_dir=f"{Path(name).name or 'model'}-{kind}")


def mesh_for(args: TrainingConfig, model: Any) -> jax.sharding.Mesh:
    """The config's mesh, else the given model's, else all devices on the data axis."""
    if args.mesh is None and isinstance(model, Model) and model.mesh is not None:
        return model.mesh
    return make_mesh(args.mesh)


def batch_rows(args: TrainingConfig, mesh: jax.sharding.Mesh) -> int:
    """Examples per optimizer step."""
    return args.per_device_train_batch_size * data_shards(mesh) * args.gradient_accumulation_steps


def tokenizer_for(processing_class: Any, model: Any, face: str) -> Any:
    """The given tokenizer, else the model's own; loaded without its weights."""
    if processing_class is not None:
        return processing_class
    if isinstance(model, Model):
        return model.tokenizer
    path = hub.resolve(need(model, face, "a model"), weights=False)
    own = any((path / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    return load_tokenizer(model if own else base_of(path) or model)


def pad_id(tokenizer: Any) -> int:
    """An id to fill padding with; masks come from lengths, so any will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def remat_policy(args: TrainingConfig) -> str:
    """The remat policy that the config asks for."""
    options = dict(args.gradient_checkpointing_kwargs or {})
    options.pop("use_reentrant", None)  # torch's; there is only one way here
    policy = options.pop("policy", "full")
    if options:
        raise ConfigError(
            f"gradient_checkpointing_kwargs knows only 'policy', got {sorted(options)}."
        )
    return policy if args.gradient_checkpointing else "none"


def compute_dtype(args: TrainingConfig) -> str:
    """bfloat16 as asked; by default on accelerators."""
    wanted = jax.default_backend() != "cpu" if args.bf16 is None else args.bf16
    return "bfloat16" if wanted else "float32"


def open_model(
    model: Any,
    args: TrainingConfig,
    mesh: jax.sharding.Mesh,
    *,
    head: str = "causal",
    value_head: bool = False,
    face: str,
    peft_config: Any = None,
) -> Model:
    """A trainer's model: loaded by name, or the given one, as the config wants it.

    With a `peft_config` it gets a new adapter, and of a model that is given by name the base is
    kept in the compute type.

    Raises:
        ModelError: not a name or a model, or one with the wrong head.
    """
    if isinstance(model, (str, Path)):
        kept = None if peft_config is None else compute_dtype(args)
        loaded = _load(model, args, mesh, head=head, value_head=value_head, param_dtype=kept)
        return adapters.adapted(loaded, peft_config, face, seed=args.seed)
    if not isinstance(model, Model):
        raise ModelError(
            f"{face} takes a path, a hub name or a model of jrlhf's AutoModel classes, got "
            f"{type(model).__module__}.{type(model).__name__}."
        )
    spec = model.net.spec
    if spec.head != head:
        wanted = "SequenceClassification" if head == "classifier" else "CausalLM"
        raise ModelError(f"{face} needs a model of AutoModelFor{wanted}, got a {spec.head} head.")
    if model.mesh is None:
        model.to_mesh(mesh)
    elif model.mesh != mesh:
        raise ModelError(
            f"{face}: the model lies on {model.mesh.shape}, the config asks for another."
        )
    changed = model.respec(
        dtype=spec.dtype if args.bf16 is None else compute_dtype(args),
        remat=remat_policy(args),
        trunk_layers=_trunk(args, spec),
        value_head=value_head or spec.value_head,
        seed=args.seed,
    )
    return adapters.adapted(changed, peft_config, face, seed=args.seed)


def _load(
    name: str | Path,
    args: TrainingConfig,
    mesh: jax.sharding.Mesh,
    *,
    head: str,
    value_head: bool,
    param_dtype: str | None,
) -> Model:
    factory: Any = AutoModelForCausalLM
    if head == "classifier":
        factory = AutoModelForSequenceClassification
    elif value_head:
        factory = AutoModelForCausalLMWithValueHead
    options: Mapping[str, Any] = {
        **({"num_labels": 1} if head == "classifier" else {}),
        "dtype": compute_dtype(args),
        "num_layers_unfrozen": args.num_layers_unfrozen,
        "remat": remat_policy(args),
        "seed": args.seed,
        **({"param_dtype": param_dtype} if param_dtype else {}),
        **(args.model_init_kwargs or {}),
    }
    return factory.from_pretrained(name, mesh=mesh, **options)


def _trunk(args: TrainingConfig, spec: Any) -> int:
    """Frozen lower layers of a given model: as the config says, else as it came."""
    if args.num_layers_unfrozen < 0:
        return spec.trunk_layers
    if args.num_layers_unfrozen > spec.num_hidden_layers:
        raise ConfigError(
            f"num_layers_unfrozen={args.num_layers_unfrozen}, but the model has "
            f"{spec.num_hidden_layers} layers."
        )
    return spec.num_hidden_layers - args.num_layers_unfrozen


def context_length(model: Any) -> int:
    """Positions of the model, read from its config alone."""
    if isinstance(model, Model):
        return model.net.spec.max_position_embeddings
    return _spec_of(model).max_position_embeddings


def _spec_of(name: str | Path, **choices: Any) -> Any:
    """The spec of a named model, read from its config alone."""
    from jrlhf.models.families import spec_from_config
    from jrlhf.models.load import open_checkpoint

    path = hub.resolve(name)
    path = hub.resolve(base_of(path) or path)
    return spec_from_config(open_checkpoint(path).config, **choices)


def use_compile_cache() -> None:
    """Keeps compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR says where (or "")."""
    if jax.config.values["jax_compilation_cache_dir"] or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    with contextlib.suppress(OSError):
        (home / "jrlhf" / "xla").mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(home / "jrlhf" / "xla"))


def one_label(model: Model, face: str) -> None:
    if model.net.spec.num_labels != 1:
        raise ModelError(f"{face} needs num_labels=1, the model has {model.net.spec.num_labels}.")


def reference_of(model: Model, ref_model: Any, args: TrainingConfig, face: str) -> Any:
    """The trainable half of the reference policy; the frozen half is shared with the policy.

    It belongs to `adapters.reference_net`. A new adapter's reference is its base: {} and no copy.

    Raises:
        ModelError: the reference is of another shape, or its frozen layers are not the policy's.
    """
    trainable, frozen = partition(model.params, model.net)
    if ref_model is None:
        return {} if adapters.base_is_reference(model) else trainable
    assert model.mesh is not None
    reference = open_model(ref_model, args, model.mesh, face=face)
    spec = model.net.spec
    if model.net.adapters:
        # A whole model of its own: its parameters cover the policy's base.
        reference = reference.respec(value_head=False)
        if reference.net != Net(model.decoder.spec.replace(value_head=False)):
            raise ModelError(
                f"{face}: ref_model must be a plain model (merge its adapters) of the same "
                "architecture as the model's base."
            )
        return reference.params
    reference = reference.respec(value_head=spec.value_head, trunk_layers=spec.trunk_layers)
    if reference.net != model.net:
        raise ModelError(f"{face}: ref_model's architecture differs from the model's.")
    theirs, below = partition(reference.params, reference.net)
    pairs = zip(jax.tree.leaves(frozen), jax.tree.leaves(below), strict=True)
    if not all(bool((a == b).all()) for a, b in pairs):
        raise ModelError(
            f"{face}: with num_layers_unfrozen the reference must share the policy's lower layers, "
            "and ref_model's differ. Leave ref_model out, or train all layers."
        )
    return theirs


def open_value_model(
    model: Any, args: TrainingConfig, mesh: jax.sharding.Mesh, *, face: str
) -> Model:
    """A classifier with one label as a value model: its score, read at every token."""
    import jax.numpy as jnp

    classifier = open_model(model, args, mesh, head="classifier", face=face)
    one_label(classifier, face)
    if isinstance(classifier.net, EncoderNet):
        raise ModelError(
            f"{face}: value_model is an encoder ({classifier.net.spec.model_type}), which reads "
            "what comes after a token as well. A value model is a decoder's classifier."
        )
    # Tied, so that no language-model head is wanted: nobody asks a value model for tokens.
    spec = classifier.net.spec.replace(head="causal", value_head=True, tie_word_embeddings=True)
    params = dict(classifier.params)
    kernel = params.pop("score")["kernel"]
    params["value"] = {"kernel": kernel, "bias": jnp.zeros((1,), kernel.dtype)}
    return Model(Net(spec), params, source=classifier.source, mesh=mesh)
