"""What is measured of a model, for the verbs that compare models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jrlhf.errors import ConfigError


def texts_of(source: str, column: str, *, name: str) -> list[str]:
    """One column of a dataset, checked to be there and to hold text.

    Raises:
        MissingColumnError: it is not there.
        DataError: a cell of it holds something else.
    """
    from jrlhf.data.cells import places, text_cell
    from jrlhf.data.sources import load_rows, require_columns

    rows = list(load_rows(source, name=name))
    require_columns(rows[0], [(column,)], name=name)
    where = places(name, 0, rows)
    return [text_cell(row, column, at) for row, at in zip(rows, where, strict=True)]


def check_output(path: str) -> None:
    """Makes a place for a file, before the work that fills it.

    Raises:
        ConfigError: there is a directory already.
    """
    if Path(path).is_dir():
        raise ConfigError(f"output={path!r} is a directory: give the file to write.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


def write_lines(path: str, rows: Sequence[Any]) -> None:
    """Writes rows as JSONL."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_text(lines, encoding="utf-8")


def sequence_logps(
    model: Any,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    temperature: float = 1.0,
    batch: int = 32,
) -> np.ndarray:
    """Sum of the log-probs of each row's tokens from `starts[i]` on, in nats.

    Args:
        model: a model of `AutoModelForCausalLM`.
        rows: token ids.
        starts: first token that counts, at least 1.
        temperature: divides the logits.
        batch: rows per forward pass, rounded up to what the mesh divides.
    """
    from jrlhf.models.build import partition
    from jrlhf.rollout.collect import score
    from jrlhf.rollout.devices import put, round_up, row_shards, to_host
    from jrlhf.rollout.engine import bucket, pad_rows
    from jrlhf.rollout.score import Actor

    width = bucket(max(len(row) for row in rows))
    count = round_up(batch, row_shards(model.mesh))
    trainable, frozen = partition(model.params, model.net)
    actor = Actor(model.net, temperature)
    sums = []
    for first in range(0, len(rows), count):
        chunk = rows[first : first + count]
        ids, lengths = pad_rows(chunk, count=count, length=width)
        placed = put(model.mesh, {"ids": ids, "lengths": lengths})
        logps = to_host(score(actor, trainable, frozen, placed, mesh=model.mesh).logps)
        for row, start in zip(logps, starts[first : first + count], strict=False):
            sums.append(float(row[start:].sum()))
    return np.asarray(sums)


def say_sampled(what: str) -> Callable[[int, int], None]:
    """What an engine's `progress` is told, as lines."""

    def show(done: int, total: int) -> None:
        print(f"  {what}: sampled {done} of {total}", flush=True)

    return show


def rewards_of(
    scorer: Any, tokenizer: Any, prompts: Sequence[list[int]], done: Sequence[Any]
) -> np.ndarray:
    """A reward model's scores of an engine's completions.

    Args:
        scorer: a `RewardModel`; it reads the ids, or their text through its own tokenizer.
        tokenizer: of the prompts and completions.
        prompts: token ids.
        done: one `Completion` per prompt.
    """
    from jrlhf.rollout.rewards import Completions

    return scorer.score(
        Completions(
            prompts=[tokenizer.decode(prompt) for prompt in prompts],
            completions=[c.text for c in done],
            prompt_ids=list(prompts),
            completion_ids=[c.ids for c in done],
            finished=[c.finished for c in done],
            columns={},
        )
    )


def policy_arm(
    name: str,
    model: Any,
    reference: Any,
    cfg: Any,
    prompts: list[list[int]],
    texts: list[list[int]],
    scorer: Any,
) -> Any:
    """Everything about one policy; the seed and the role fix its samples."""
    from jrlhf import report
    from jrlhf.trainers import online

    engine = online.make_engine(
        model, model.tokenizer, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
        eos_token_ids=online.eos_ids(model, model.tokenizer), rows=cfg.rows,
    )  # fmt: skip
    done = engine.generate(
        model.params, prompts, seed=cfg.seed, role="evaluate", progress=say_sampled(name)
    )
    rows = [[*p, *c.ids] for p, c in zip(prompts, done, strict=True)]
    starts = [len(p) for p in prompts]

    def logps(of: Any, rows: Sequence[Sequence[int]], starts: Sequence[int], t: float) -> Any:
        return sequence_logps(of, rows, starts, temperature=t, batch=cfg.rows)

    own = logps(model, rows, starts, cfg.temperature)
    base = own if model is reference else logps(reference, rows, starts, cfg.temperature)
    rewards = rewards_of(scorer, model.tokenizer, prompts, done).tolist()
    print(f"  {name}: scored by the reward model, mean {np.mean(rewards):.3g}", flush=True)
    losses = (-logps(model, texts, [1] * len(texts), 1.0)).tolist() if texts else ()
    if texts:
        print(f"  {name}: read {len(texts)} held-out texts", flush=True)
    return report.Arm(
        name=name,
        completions=[c.text for c in done],
        tokens=[len(c.ids) for c in done],
        rewards=rewards,
        kl=(own - base).tolist(),
        losses=losses,
    )
