"""From what users write to what a run needs: models, tokenizers, meshes, sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jrlhf.auto import (
    AutoModelForCausalLM,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSequenceClassification,
)
from jrlhf.config import TrainingConfig
from jrlhf.errors import ConfigError, ModelError, suggest
from jrlhf.model import Model
from jrlhf.models import hub
from jrlhf.models.build import Net
from jrlhf.models.build_encoder import EncoderNet
from jrlhf.models.halves import partition
from jrlhf.models.lora.config import base_of
from jrlhf.models.spec import REMAT_POLICIES
from jrlhf.models.tokenizer import load_tokenizer
from jrlhf.sharding.mesh import data_shards, make_mesh
from jrlhf.train.callbacks import check_callbacks
from jrlhf.train.optim import make_optimizer
from jrlhf.train.writers import reporters
from jrlhf.trainers import adapters
from jrlhf.trainers.arguments import modernise


class Start(NamedTuple):
    """What every face knows once its arguments are read; no weight is loaded yet.

    Attributes:
        args: the config, with an output_dir.
        model: as given: a path, a hub name or a model.
        tokenizer: the policy's (or classifier's).
        mesh: where the run lives.
        given: the face's arguments, old names translated.
        context: positions of the model.
        vocab_size: of the model.
    """

    args: Any
    model: Any
    tokenizer: Any
    mesh: jax.sharding.Mesh
    given: dict[str, Any]
    context: int
    vocab_size: int

    @property
    def max_length(self) -> int:
        """The config's max_length within the context."""
        asked = self.args.max_length
        return self.context if asked is None else min(asked, self.context)

    @property
    def data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed


def one_of(argument: str, value: Any, args: Any, field: str) -> None:
    """Refuses an argument and a field of the config that say the same differently."""
    other = getattr(args, field)
    if value is not None and other is not None and value != other:
        said = value if isinstance(value, (str, Path)) else type(value).__name__
        raise ConfigError(
            f"{argument} ({said}) and {type(args).__name__}.{field}={other!r} are both given: "
            "give one of them."
        )


def start(
    face: str, config_class: type, kind: str, given: dict[str, Any], old: dict[str, Any]
) -> Start:
    """Reads a face's arguments; everything that can be wrong without a model is found here."""
    given = modernise(face, config_class, given, old)
    given["callbacks"] = check_callbacks(given["callbacks"], face)
    fallback = getattr(given["args"], "sft_model_path", None)
    if fallback is not None:
        one_of("model", given["model"], given["args"], "sft_model_path")
    model = need(given["model"] or fallback, face, "a model (--model_name_or_path)")
    need(given["train_dataset"], face, "a train_dataset")
    if given.get("peft_config") is not None:
        head = "classifier" if kind == "Reward" else "causal"
        spec = _spec_of(model, head=head)
        given["peft_config"] = adapters.check(
            face, given["args"], model, given["peft_config"], spec
        )
    args = named_output(given["args"], model, kind)
    _check_init_kwargs(args, model, face)
    make_optimizer(args, 1)  # to know the names
    remat_policy(args)
    reporters(args.report_to)
    use_compile_cache()
    spec = _spec_of(model)  # before the tokenizer: it says what is no model at all
    tokenizer = tokenizer_for(given["processing_class"], model, face)
    return Start(
        args, model, tokenizer, mesh_for(args, model), given,
        context=spec.max_position_embeddings, vocab_size=spec.vocab_size,
    )  # fmt: skip


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
    if isinstance(processing_class, (str, Path)):
        return load_tokenizer(processing_class)
    if processing_class is not None:
        if not callable(getattr(processing_class, "decode", None)):
            raise ConfigError(
                f"{face}: processing_class must be a tokenizer or its path or hub name, got "
                f"{type(processing_class).__name__}."
            )
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
            f"gradient_checkpointing_kwargs knows only 'policy', got {sorted(options, key=str)}."
        )
    if policy not in REMAT_POLICIES:
        raise ConfigError(
            f"gradient_checkpointing_kwargs: policy={policy!r} is not known; known:"
            f" {', '.join(REMAT_POLICIES)}.{suggest(str(policy), REMAT_POLICIES)}"
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


def _spec_of(model: Any, **choices: Any) -> Any:
    """The spec of a model, or of a named one; that is read from its config alone."""
    if isinstance(model, Model):
        return model.net.spec
    from jrlhf.models.families import spec_from_config
    from jrlhf.models.load import open_checkpoint

    path = hub.resolve(model)
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
