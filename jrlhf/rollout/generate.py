"""`generate` with transformers' arguments and result, on top of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jrlhf.errors import DataError
from jrlhf.models.build import Net
from jrlhf.rollout.engine import Engine, bucket
from jrlhf.rollout.sampling import SamplingParams
from jrlhf.types import PyTree


def generate_like_transformers(
    net: Net,
    params: PyTree,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    max_new_tokens: int = 20,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = 0,
    top_p: float | None = 1.0,
    min_p: float | None = 0.0,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> np.ndarray:
    """Returns the prompts as given, then the completions, then padding.

    Left, right or no padding give the same completions: tokens under a mask of 0 are dropped first.
    The sampling arguments are those of `SamplingParams`; None turns one off.

    Args:
        net: a causal language model.
        params: its parameters.
        input_ids: `[b s]` integers.
        attention_mask: `[b s]`, 1 for real tokens; None: all are.
        eos_token_id: one id or several; None never ends early.
        pad_token_id: default: the first EOS id, else 0.
        seed: row i samples with a key of (seed, i).
        mesh: where the parameters live, if not on one device.
    """
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or not ids.size:
        raise DataError(f"input_ids must be [rows, tokens] and not empty, got shape {ids.shape}.")
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
    if mask.shape != ids.shape:
        raise DataError(f"attention_mask {mask.shape} and input_ids {ids.shape} differ in shape.")
    ends = () if eos_token_id is None else tuple(np.atleast_1d(eos_token_id).tolist())
    sampling = SamplingParams(
        max_new_tokens=bucket(max_new_tokens),
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        min_p=min_p or 0.0,
        repetition_penalty=repetition_penalty,
        min_new_tokens=min_new_tokens,
        eos_token_ids=ends,
        pad_token_id=(ends or (0,))[0] if pad_token_id is None else pad_token_id,
    )
    prompts = [row[real.astype(bool)].tolist() for row, real in zip(ids, mask, strict=True)]
    run = Engine(net, None, sampling, mesh=mesh).generate
    done = run(params, prompts, seed=seed, role="generate", max_new_tokens=max_new_tokens)
    tail = np.full((len(done), max(len(c.ids) for c in done)), sampling.pad_token_id, ids.dtype)
    for row, completion in zip(tail, done, strict=True):
        row[: len(completion.ids)] = completion.ids
    return np.concatenate([ids, tail], axis=1)
