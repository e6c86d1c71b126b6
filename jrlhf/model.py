"""A loaded model as users hold it: call it, generate with it, save it."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.errors import ModelError
from jrlhf.models import hub, inputs, special_tokens, vocabulary
from jrlhf.models.arguments import CALL, COUNT, GENERATE, SAVE, check
from jrlhf.models.build import Net, Params
from jrlhf.models.build_encoder import AnyNet, EncoderNet
from jrlhf.models.families import config_from_spec, family_of
from jrlhf.models.halves import restack
from jrlhf.models.hf.writer import export_config
from jrlhf.models.load import Source
from jrlhf.models.save import save_pretrained
from jrlhf.models.tokenizer import load_tokenizer
from jrlhf.ops.layout import jit
from jrlhf.rollout.encode import classify
from jrlhf.rollout.generate import generate_like_transformers
from jrlhf.sharding.place import params_shardings
from jrlhf.sharding.rules import activate


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
        source: the files or the config it came from.
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
            if self.source is None or self.source.path is None:
                raise ModelError(
                    "This model has no files and so no tokenizer: pass processing_class."
                )
            self._tokenizer = load_tokenizer(self.source.path)
        return self._tokenizer

    @property
    def config(self) -> Any:
        """A transformers config with this model's sizes."""
        from transformers import AutoConfig

        origin = {} if self.source is None else self.source.config
        spec = self.net.spec
        values = export_config(
            config_from_spec(spec), origin, classifier=spec.head != "causal", dtype=spec.dtype
        )
        return AutoConfig.for_model(values.pop("model_type"), **values)

    @property
    def decoder(self) -> Net:
        """The net of a model that can write; ModelError if it is an encoder."""
        if isinstance(self.net, EncoderNet):
            raise ModelError(f"{self.name_or_path} is an encoder: it scores texts, it writes none.")
        return self.net

    def num_parameters(self, **others: Any) -> int:
        """Parameters of the model; padding of the vocabulary does not count."""
        check("num_parameters", others, COUNT, ())
        spec = self.net.spec
        rows = family_of(spec).weights(spec)
        return sum(math.prod(row.shape) * len(list(row.places(spec))) for row in rows)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        token_type_ids: Any = None,
        **others: Any,
    ) -> ModelOutput:
        """Runs the model.

        Args:
            input_ids: [b s], padded on either side.
            attention_mask: 1 for real tokens, [b s]; None: all are real.
            position_ids: [b s], as transformers counts them; None: over the real tokens.
            token_type_ids: [b s], of encoders that have a table of them; None: all 0.

        Raises:
            ModelError: inputs of another shape, or out of the model's range.
            ConfigError: an argument of transformers that is none here.
        """
        check("model(...)", others, CALL, ("input_ids", "attention_mask", "position_ids"))
        ids, mask = inputs.tokens(self.net.spec, input_ids, attention_mask)
        positions = inputs.positions(self.net.spec, position_ids, mask)
        if isinstance(self.net, EncoderNet):
            types = inputs.types(self.net.spec, token_type_ids, ids)
            return ModelOutput(
                classify(self.net, self.params, ids, mask, positions, types, mesh=self.mesh)
            )
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
        **others: Any,
    ) -> np.ndarray:
        """Samples or decodes greedily; returns prompt and completion, padded at the end.

        `eos_token_id=None` takes the model's own, as transformers does; -1 never stops early. The
        other arguments are those of `rollout.generate.generate_like_transformers`.
        """
        check("generate", others, GENERATE, ("max_new_tokens", "do_sample", "temperature"))
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
        """The ids that end a generation: generation_config.json's, else config.json's.

        Ids beyond the vocabulary, which no model can say, are left out. The class's default in a
        config alone does not count beside a tokenizer that ends otherwise.
        """
        if self.source is None:
            return []
        found = (self.source.generation_config or {}).get("eos_token_id")
        found = self.source.config.get("eos_token_id") if found is None else found
        ids = special_tokens.as_ids(found)
        if not all(type(i) is int for i in ids):
            where = self.source.path or "its config"
            raise ModelError(f"eos_token_id={found!r} in {where}: expected ids.")
        ids = [i for i in ids if 0 <= i < self.net.spec.vocab_size]
        if self.source.kind == "config" and self._tokenizer is not None:
            ids = special_tokens.ends(ids, self._tokenizer, alone=True)
        return ids

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        dtype: str = "float32",
        max_shard_size: str | int = "5GB",
        tokenizer: Any = None,
        keep_vocab_padding: bool = False,
        **others: Any,
    ) -> None:
        """Writes safetensors, configs and tokenizer; transformers loads the same weights back.

        The arguments are those of `models.save.save_pretrained`.
        """
        check("save_pretrained", others, SAVE, ("dtype", "max_shard_size", "tokenizer"))
        save_pretrained(
            save_directory, self.net, self.params, source=self.source, dtype=dtype,
            tokenizer=tokenizer, own_tokenizer=self._tokenizer, max_shard_size=max_shard_size,
            keep_vocab_padding=keep_vocab_padding,
        )  # fmt: skip

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload model",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> str | None:
        """Saves the model for a moment and uploads it; returns the commit's URL.

        With several processes every one must call it; the first uploads, the others get None.

        Args:
            repo_id: "name" or "organisation/name"; made if absent.
            commit_message: of the commit.
            private: of a new repository.
            token: with the right to write; None: HF_TOKEN, or the one of `hf auth login`.
            revision: a branch; None: main.
            create_pr: opens a pull request instead of committing.
            **options: of `save_pretrained`.

        Raises:
            ConfigError: an id that cannot be, or a wrong option.
            HubError: the hub refuses it or cannot be reached.
        """
        hub.check_id(repo_id)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, **options)
            if jax.process_index() != 0:
                return None
            return hub.upload(
                Path(directory), repo_id, message=commit_message, token=token, private=private,
                revision=revision, create_pr=create_pr,
            )  # fmt: skip

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
        *,
        seed: int = 0,
    ) -> jax.Array:
        """Gives the model room for another number of tokens, and returns the embedding table.

        Args:
            new_num_tokens: the vocabulary, usually `len(tokenizer)`; None: as it is.
            pad_to_multiple_of: rounds the table up with rows that are no tokens: their logits are
                -inf, and `save_pretrained` leaves them out (transformers makes tokens of them).
            mean_resizing: new rows lie at the old ones' mean; else they are drawn like a new model.
            seed: of the new rows.

        Raises:
            ConfigError: sizes below 1.
        """
        if (new_num_tokens, pad_to_multiple_of) != (None, None):
            self.net, self.params = vocabulary.resized(
                self.net,
                self.params,
                self.net.spec.vocab_size if new_num_tokens is None else new_num_tokens,
                multiple=1 if pad_to_multiple_of is None else pad_to_multiple_of,
                at_mean=mean_resizing,
                key=jax.random.key(seed),
            )
            if self.mesh is not None:
                self.to_mesh(self.mesh)
        return self.params["embed"]["table"]

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


@functools.partial(jit, static_argnames=("net", "mesh"))
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
