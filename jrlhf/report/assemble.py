"""From two sets of completions to an `Evaluation`: the judges are asked here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jrlhf.errors import DataError
from jrlhf.report.judge import Judge
from jrlhf.report.schema import Completion, Evaluation, Sample, Scalar, TextLoss


class Arm(NamedTuple):
    """One policy's completions of the held-out prompts, in the prompts' order.

    Attributes:
        name: of the policy, such as "sft" or "ppo".
        completions: decoded, without special tokens.
        tokens: length of each in tokens, EOS included.
        rewards: the reward model's score of prompt + completion.
        kl: sum over the completion's tokens of log policy - log reference; zeros for the reference.
        losses: negative log-likelihood of each held-out text in nats, summed over its tokens.
    """

    name: str
    completions: Sequence[str]
    tokens: Sequence[int]
    rewards: Sequence[float]
    kl: Sequence[float]
    losses: Sequence[float] = ()


def assemble(
    *,
    title: str,
    prompts: Sequence[str],
    before: Arm,
    after: Arm,
    judges: Sequence[Judge] = (),
    text_tokens: Sequence[int] = (),
    settings: Mapping[str, Scalar] | None = None,
) -> Evaluation:
    """Scores both arms with every judge and returns the comparison.

    Args:
        title: what was trained on what, one line.
        prompts: the held-out prompts as text.
        before: the first policy, the reference of the KL.
        after: the trained policy.
        judges: asked with prompt and completion joined.
        text_tokens: scored tokens of each held-out text, as in `Arm.losses`.
        settings: shown on the page as they are.

    Raises:
        DataError: an arm's lists have another length than the prompts or texts.
    """
    for arm in (before, after):
        for name in ("completions", "tokens", "rewards", "kl"):
            if (seen := len(getattr(arm, name))) != len(prompts):
                raise DataError(f"{arm.name}: {seen} {name} for {len(prompts)} prompts.")
        if len(arm.losses) != len(text_tokens):
            raise DataError(
                f"{arm.name}: {len(arm.losses)} losses for {len(text_tokens)} held-out texts."
            )
    first, second = (_completions(prompts, arm, judges) for arm in (before, after))
    return Evaluation(
        title=title,
        before=before.name,
        after=after.name,
        samples=tuple(
            Sample(prompt=prompt, before=one, after=two)
            for prompt, one, two in zip(prompts, first, second, strict=True)
        ),
        texts=tuple(
            TextLoss(tokens=int(count), before=float(one), after=float(two))
            for count, one, two in zip(text_tokens, before.losses, after.losses, strict=True)
        ),
        judges={judge.name: judge.description for judge in judges},
        settings=dict(settings or {}),
    )


def _completions(prompts: Sequence[str], arm: Arm, judges: Sequence[Judge]) -> list[Completion]:
    whole = [prompt + text for prompt, text in zip(prompts, arm.completions, strict=True)]
    verdicts = {judge.name: judge.score(whole) for judge in judges}
    return [
        Completion(
            text=text,
            tokens=int(arm.tokens[i]),
            reward=float(arm.rewards[i]),
            kl=float(arm.kl[i]),
            judges={name: float(scores[i]) for name, scores in verdicts.items()},
        )
        for i, text in enumerate(arm.completions)
    ]
