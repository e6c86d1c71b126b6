"""`jrlhf evaluate`: two policies on held-out prompts and texts, into an evaluation.json."""

from __future__ import annotations

from pathlib import Path

from jrlhf.commands.arguments import parse
from jrlhf.config import check_counts, config
from jrlhf.errors import ConfigError


@config
class EvaluateConfig:
    """What to compare, and how.

    Attributes:
        before: the policy that training started from; also the reference of the KL.
        after: the trained policy.
        reward_model_path: the reward model that training used.
        prompts: JSONL with a column prompt.
        texts: JSONL with a column text, for perplexity.
        judge_rows: JSONL with text and label, which the naive-Bayes judge is fitted on.
        judge_words: the judge is calibrated on texts of so many words.
        output: where to write.
        title: one line for the page.
        max_new_tokens: longest completion.
        temperature: of sampling, and of the KL.
        rows: rows per forward pass.
        max_length: texts are cut there, tokens.
        seed: of the samples; both policies draw with the same keys.
        mesh: device mesh, as everywhere.
        bf16: compute in bfloat16.
    """

    before: str
    after: str
    reward_model_path: str
    prompts: str
    judge_rows: str
    texts: str | None = None
    judge_words: int | None = None
    output: str = "evaluation.json"
    title: str = "Before and after"
    max_new_tokens: int = 48
    temperature: float = 1.0
    rows: int = 32
    max_length: int = 64
    seed: int = 0
    mesh: dict[str, int] | str | None = None
    bf16: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "max_new_tokens", "rows", "max_length", "judge_words")


def main(argv: list[str]) -> int:
    (cfg,) = parse(argv, EvaluateConfig, verb="evaluate")
    for name in ("before", "after", "reward_model_path", "prompts", "texts", "judge_rows"):
        value = getattr(cfg, name)
        if name in ("prompts", "texts", "judge_rows") and value and not Path(value).is_file():
            raise ConfigError(f"jrlhf evaluate: {name}={value!r} is not a file.")
    from jrlhf import report
    from jrlhf.auto import AutoModelForCausalLM
    from jrlhf.commands.scoring import policy_arm, texts_of
    from jrlhf.data.encode import Encoder
    from jrlhf.sharding.mesh import make_mesh
    from jrlhf.trainers.online import reward_model

    mesh = make_mesh(cfg.mesh)
    prompts = texts_of(cfg.prompts, "prompt", name="prompts")
    raw = [] if cfg.texts is None else texts_of(cfg.texts, "text", name="texts")
    judges = report.sentiment_judges(cfg.judge_rows, calibrate_words=cfg.judge_words)
    print("  judges: fitted", flush=True)
    dtype = "bfloat16" if cfg.bf16 else "float32"
    before, after = (
        AutoModelForCausalLM.from_pretrained(name, mesh=mesh, dtype=dtype)
        for name in (cfg.before, cfg.after)
    )
    encoder = Encoder(before.tokenizer)
    ids = [row.tolist() for row in encoder.texts(prompts)]
    texts = [row.tolist()[: cfg.max_length] for row in encoder.texts(raw, eos=True)] if raw else []
    scorer = reward_model(
        cfg.reward_model_path, before.tokenizer, mesh=mesh, rows=cfg.rows, dtype=dtype
    )
    arms = [
        policy_arm(name, model, before, cfg, ids, texts, scorer)
        for name, model in (("before", before), ("after", after))
    ]
    evaluation = report.assemble(
        title=cfg.title,
        prompts=prompts,
        before=arms[0]._replace(name=_name(cfg.before)),
        after=arms[1]._replace(name=_name(cfg.after)),
        judges=judges,
        text_tokens=[len(row) - 1 for row in texts],
        settings={"seed": cfg.seed, "temperature": cfg.temperature,
                  "max_new_tokens": cfg.max_new_tokens},
    )  # fmt: skip
    report.save(evaluation, cfg.output)
    print(f"Wrote {cfg.output}.")
    return 0


def _name(path: str) -> str:
    parts = Path(path).parts
    return parts[-2] if parts[-1] == "model" and len(parts) > 1 else parts[-1]
