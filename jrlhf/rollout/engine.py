"""The generation engine: lists of prompts in, completions out, few compiled shapes in between.

Prompts are sorted by length, cut into chunks of a fixed number of rows and padded to a bucket, so
that a whole training run uses a handful of executables. A row's key depends on (seed, role, step,
global row id) only.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jrlhf.errors import ConfigError, DataError, ModelError, PromptTooLongError
from jrlhf.models.build import Net
from jrlhf.rollout.devices import agree_max, everywhere, put, round_up, row_shards, to_host
from jrlhf.rollout.sampling import Sampled, SamplingParams, sample
from jrlhf.rollout.stops import stops_of
from jrlhf.types import PyTree


class Completion(NamedTuple):
    """One completion.

    Attributes:
        ids: token ids, the ending EOS included.
        logps: the sampler's log-prob of each of them.
        finished: ended by an EOS or a stop string, not by the length limit.
        text: decoded without special tokens; "" without a tokenizer.
    """

    ids: list[int]
    logps: list[float]
    finished: bool
    text: str


def bucket(length: int, multiple: int = 16) -> int:
    """The next multiple of `multiple`, in steps that grow with the length.

    Up to 8 multiples every one is a bucket; beyond, only four per doubling, so that lengths up to L
    need O(log L) executables and waste at most a quarter.
    """
    step = multiple
    while length > 8 * step:
        step *= 2
    return max(step, -(-length // step) * step)


def role_id(role: str) -> int:
    """A stable number for a role's name, to be folded into a key."""
    return zlib.crc32(role.encode())


@jax.jit
def row_keys(seed: Any, role: Any, step: Any, row_ids: Any) -> jax.Array:
    """One typed threefry key per row, a function of (seed, role, step, global row id)."""
    key = jax.random.key(seed, impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, role), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, row_ids)


class Engine:
    """Samples completions for any number of prompts.

    Attributes:
        net: the policy.
        tokenizer: decodes completions; None gives no text and allows no stop strings.
        sampling: see `SamplingParams`.
    """

    def __init__(
        self,
        net: Net,
        tokenizer: Any,
        sampling: SamplingParams,
        *,
        mesh: jax.sharding.Mesh | None = None,
        rows: int | None = None,
        prompt_bucket: int = 16,
        stop_strings: Sequence[str] = (),
    ) -> None:
        """Prepares an engine; nothing is compiled yet.

        Args:
            net: the policy.
            tokenizer: its tokenizer, or None.
            sampling: how to sample.
            mesh: rows are split over its data and fsdp axes; None: one device.
            rows: rows per call of the sampler, rounded up to what the mesh divides; None: the next
                power of two of the number of prompts, at most 64.
            prompt_bucket: prompt lengths are rounded up to `bucket(length, prompt_bucket)`.
            stop_strings: a completion ends after the token that completes one of them.
        """
        if stop_strings and tokenizer is None:
            raise DataError("stop_strings need a tokenizer to decode with.")
        self.net, self.tokenizer, self.sampling = net, tokenizer, sampling
        self._mesh, self._rows, self._bucket = mesh, rows, prompt_bucket
        self._stops = tuple(s for s in stop_strings if s)
        found = stops_of(tokenizer, self._stops, net.spec.vocab_size)
        self._automaton = None if found is None else everywhere(mesh, found)

    def generate(
        self,
        params: PyTree,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int,
        role: str = "rollout",
        step: int = 0,
        row_ids: Sequence[int] | None = None,
        group: int = 1,
        prompt_length: int | None = None,
        max_new_tokens: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Samples `group` completions per prompt, neighbours in the result.

        Args:
            params: the policy's parameters, on the device, sharded in any way.
            prompts: token ids without padding.
            seed: of the run.
            role: what the samples are for; another role draws other samples.
            step: the rollout's number in the run.
            row_ids: global ids of the completions, default 0, 1, …; a row's samples follow its id.
            group: completions per prompt; they share its prefill.
            prompt_length: pad prompts to exactly this; default: a bucket per chunk.
            max_new_tokens: stop earlier than `sampling.max_new_tokens`, by the same executable.
            progress: called with (rows done, rows in all) after each chunk.

        Raises:
            DataError: a prompt without tokens.
            PromptTooLongError: prompt and completion do not fit the model's context.
        """
        ids = list(range(len(prompts) * group)) if row_ids is None else [int(i) for i in row_ids]
        limit = self.sampling.max_new_tokens if max_new_tokens is None else max_new_tokens
        self._check(prompts, len(ids) // group, prompt_length, limit)
        rows = self._row_count(len(ids))
        share = self._share(rows, group)
        prompts = [prompt for prompt in prompts for _ in range(group // share)]
        owned = [ids[i * share : (i + 1) * share] for i in range(len(prompts))]
        # Sorting makes chunks a function of the set of rows, not of their order.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), owned[i]))
        if prompt_length is None and jax.process_count() > 1:  # all must run the same shapes
            longest = agree_max(max(len(p) for p in prompts))
            prompt_length = bucket(longest, self._bucket)
        out: list[list[Completion]] = [[] for _ in prompts]
        count = rows // share
        for start in range(0, len(order), count):
            chunk = order[start : start + count]
            width = prompt_length or bucket(max(len(prompts[i]) for i in chunk), self._bucket)
            host = pad_rows([prompts[i] for i in chunk], count=count, length=width)
            wanted = np.zeros(count * share, np.uint32)
            wanted[: len(chunk) * share] = [row for i in chunk for row in owned[i]]
            sampled = self._run(params, *host, wanted, (seed, role_id(role), step), limit)
            for place, i in enumerate(chunk):
                found = range(place * share, (place + 1) * share)
                out[i] = [self._completion(sampled, row) for row in found]
            if progress is not None:
                progress((start + len(chunk)) * share, len(ids))
        return [completion for row in out for completion in row]

    def _run(
        self,
        params: PyTree,
        ids: np.ndarray,
        lengths: np.ndarray,
        row_ids: np.ndarray,
        root: tuple[int, int, int],
        limit: int,
    ) -> Sampled:
        seed, role, step = (np.uint32(x % 2**32) for x in root)
        placed = put(self._mesh, {"ids": ids, "lengths": lengths, "row_ids": row_ids})
        keys = row_keys(seed, role, step, placed["row_ids"])
        result = sample(
            self.net,
            params,
            placed["ids"],
            placed["lengths"],
            keys,
            self.sampling,
            np.int32(limit),
            self._automaton,
            mesh=self._mesh,
        )
        found = jax.tree.map(to_host, result)
        if not np.isfinite(found.logps).all():
            raise ModelError(
                f"The policy's log-probs are not finite at rollout {step}: its weights are NaN or "
                "infinite, or the logits overflow."
            )
        return found

    def _completion(self, sampled: Sampled, row: int) -> Completion:
        n = int(sampled.lengths[row])
        ids = sampled.ids[row, :n].tolist()
        logps = sampled.logps[row, :n].tolist()
        finished = bool(sampled.done[row])
        if self._stops and self._stopped(ids):
            keep = next(k for k in range(1, len(ids) + 1) if self._stopped(ids[:k]))
            ids, logps, finished = ids[:keep], logps[:keep], True
        text = (
            "" if self.tokenizer is None else self.tokenizer.decode(ids, skip_special_tokens=True)
        )
        return Completion(ids, logps, finished, text)

    def _stopped(self, ids: list[int]) -> bool:
        # Special tokens stay in this text: a stop string may be one of them.
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return any(s in text for s in self._stops)

    def _row_count(self, completions: int) -> int:
        """Rows of one call that belong to this process."""
        processes = jax.process_count()
        rows = self._rows or min(64, 1 << max(0, completions * processes - 1).bit_length())
        return round_up(rows, row_shards(self._mesh)) // processes

    def _share(self, rows: int, group: int) -> int:
        """Completions per prefilled prompt: the group where the prompts of a call can be cut."""
        prompts, shards = rows // group, row_shards(self._mesh) // jax.process_count()
        return group if prompts and prompts % max(shards, 1) == 0 else 1

    def _check(
        self, prompts: Sequence[Sequence[int]], given: int, width: int | None, limit: int
    ) -> None:
        context = self.net.spec.context
        if limit < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {limit!r}.")
        if given != len(prompts):
            raise DataError(f"{len(prompts)} prompts came with row_ids for {given}.")
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise DataError(f"Prompt {i} has no tokens; the model needs at least one (a BOS).")
            if not 0 <= min(prompt) <= max(prompt) < self.net.spec.vocab_size:
                raise DataError(
                    f"Prompt {i} has tokens from {min(prompt)} to {max(prompt)}, the model 0 to "
                    f"{self.net.spec.vocab_size - 1}. Is the tokenizer the model's?"
                )
            if width is not None and len(prompt) > width:
                raise PromptTooLongError(
                    f"Prompt {i} has {len(prompt)} tokens, prompt_length is {width}."
                )
            if context is not None and len(prompt) + limit > context:
                raise PromptTooLongError(
                    f"Prompt {i} has {len(prompt)} tokens; with {limit} new tokens it exceeds "
                    f"the model's context of {context}."
                )


def pad_rows(
    rows: Sequence[Sequence[int]], *, length: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads token lists to `[count, length]`, with zero-length rows at the end."""
    ids = np.zeros((count, length), np.int32)
    lengths = np.zeros(count, np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        lengths[i] = len(row)
    return ids, lengths
