"""A sequence classifier as a reward: it reads prompt and completion and scores the last token."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jrlhf.errors import ModelError, RewardError
from jrlhf.models.build_encoder import AnyNet, EncoderNet
from jrlhf.models.tokenizer import same_tokenizer
from jrlhf.ops.layout import jit
from jrlhf.rollout.devices import active, agree_max, put, round_up, row_shards, to_host
from jrlhf.rollout.engine import bucket, pad_rows
from jrlhf.rollout.score import outputs
from jrlhf.types import Batch, PyTree

if TYPE_CHECKING:
    from jrlhf.rollout.rewards import Completions


@functools.partial(jit, static_argnames=("net", "mesh"))
def _scores(
    net: AnyNet, params: PyTree, batch: Batch, mesh: jax.sharding.Mesh | None
) -> Float[Array, " b"] | None:
    with active(mesh):
        return outputs(net, params, batch).scores


class RewardModel:
    """A classifier with one score per text, and how to show it a completion.

    With the policy's tokenizer it reads the very ids that were sampled, so that its last token is
    the EOS exactly when the completion ended, as in its training data. With another tokenizer it
    reads the decoded text through that one, with the special tokens that it adds by itself, and
    with its EOS at the end of finished completions. An encoder always reads text: its score stands
    on the [CLS] that only its tokenizer writes.
    """

    def __init__(
        self,
        net: AnyNet,
        params: PyTree,
        tokenizer: Any,
        *,
        policy_tokenizer: Any = None,
        max_length: int | None = None,
        rows: int = 16,
        append_eos: bool = True,
        mesh: jax.sharding.Mesh | None = None,
        name: str = "reward_model",
    ) -> None:
        """Prepares a reward model; nothing is compiled yet.

        Args:
            net: a classifier with one label.
            params: its parameters.
            tokenizer: its tokenizer.
            policy_tokenizer: the one of the prompts and completions; None: the same.
            max_length: longer texts lose their beginning; default: the model's context.
            rows: rows per call, rounded up to what the mesh divides.
            append_eos: with another tokenizer, end finished completions with its EOS.
            mesh: where the parameters live, if not on one device.
            name: for metrics and messages.
        """
        if net.spec.head != "classifier" or net.spec.num_labels != 1:
            raise ModelError(
                f"A reward model is a classifier with 1 label; {name} has head "
                f"{net.spec.head!r} with {net.spec.num_labels}."
            )
        self.net, self.params, self.tokenizer = net, params, tokenizer
        self.__name__ = name
        self.max_length = min(max_length or 10**9, net.spec.max_position_embeddings)
        same = policy_tokenizer is None or same_tokenizer(tokenizer, policy_tokenizer)
        self.reads_ids = same and not isinstance(net, EncoderNet)
        self._policy_tokenizer = policy_tokenizer or tokenizer
        self._append_eos, self._mesh = append_eos, mesh
        self._rows = round_up(rows, row_shards(mesh))
        if not self.reads_ids:
            # The completion is what the score is about: a long text must lose its beginning.
            self.tokenizer = copy.deepcopy(tokenizer)
            self.tokenizer.truncation_side = "left"

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        """Scores plain texts, with TRL's signature for reward functions."""
        return self.score_texts([p + c for p, c in zip(prompts, completions, strict=True)]).tolist()

    def score(self, done: Completions) -> np.ndarray:
        """Scores finished samples, by ids or by text."""
        rows = [[*p, *c] for p, c in zip(done.prompt_ids, done.completion_ids, strict=True)]
        if self.reads_ids:
            return self.score_ids(rows)
        decode = functools.partial(self._policy_tokenizer.decode, skip_special_tokens=True)
        texts = [
            self._chat(prompt, completion) if isinstance(prompt, list) else decode(row)
            for prompt, completion, row in zip(done.prompts, done.completions, rows, strict=True)
        ]
        return self.score_texts(texts, done.finished)

    def _chat(self, prompt: list[Any], completion: list[Any]) -> str:
        """A conversation by this model's own template; its lines alone where it has none."""
        messages = [*prompt, *completion]
        if getattr(self.tokenizer, "chat_template", None):
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        return "\n".join(str(message["content"]) for message in messages)

    def score_texts(
        self, texts: Sequence[str], finished: Sequence[bool] | None = None
    ) -> np.ndarray:
        """Scores texts through the model's own tokenizer."""
        eos = self.tokenizer.eos_token_id if self._append_eos else None
        rows = []
        for i, text in enumerate(texts):
            ends = eos is not None and (finished is None or finished[i])
            room = self.max_length - ends
            ids = self.tokenizer(text, truncation=True, max_length=room)["input_ids"]
            rows.append([*ids, eos] if ends and ids[-1:] != [eos] else ids)
        return self.score_ids(rows)

    def score_ids(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Scores token rows at their last token; longer ones than `max_length` lose their start.

        Raises:
            RewardError: a row without tokens.
        """
        for i, row in enumerate(rows):
            if len(row) == 0:
                raise RewardError(f"{self.__name__}: text {i} has no tokens to score.")
        rows = [list(row)[-self.max_length :] for row in rows]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        longest = agree_max(max(map(len, rows))) if jax.process_count() > 1 else None
        out = np.zeros(len(rows), np.float32)
        for start in range(0, len(order), self._rows):
            chunk = order[start : start + self._rows]
            width = bucket(longest or max(len(rows[i]) for i in chunk))
            ids, lengths = pad_rows([rows[i] for i in chunk], length=width, count=self._rows)
            batch = put(self._mesh, {"ids": ids, "lengths": lengths})
            scores = to_host(_scores(self.net, self.params, batch, self._mesh))
            out[chunk] = scores[: len(chunk)]
        return out
