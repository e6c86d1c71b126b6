"""`jrlhf label`: pairs of completions, ordered by a reward model; training data for `jrlhf dpo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jrlhf.commands.arguments import parse
from jrlhf.config import check_counts, config
from jrlhf.errors import ConfigError


@config
class LabelConfig:
    """What to sample and who judges.

    Attributes:
        model_name_or_path: the policy that writes.
        reward_model_path: the reward model that orders.
        dataset_name: rows with a column prompt (text).
        output: JSONL of prompt, chosen, rejected and their margin.
        max_prompts: use so many prompts; None: all.
        num_generations: completions per prompt; the best and the worst make the pair.
        max_new_tokens: longest completion.
        temperature: of sampling.
        rows: rows per call of the sampler and the reward model.
        seed: of the samples.
        mesh: device mesh, as everywhere.
        bf16: compute in bfloat16.
    """

    model_name_or_path: str
    reward_model_path: str
    dataset_name: str
    output: str = "pairs.jsonl"
    max_prompts: int | None = None
    num_generations: int = 2
    max_new_tokens: int = 48
    temperature: float = 1.0
    rows: int = 32
    seed: int = 0
    mesh: dict[str, int] | str | None = None
    bf16: bool = False

    SYNONYMS = {"model": "model_name_or_path", "dataset": "dataset_name"}

    def __post_init__(self) -> None:
        check_counts(self, "max_prompts", "max_new_tokens", "rows")


def parts(cfg: LabelConfig) -> tuple[Any, Any, Any]:
    """The policy, its sampler and the judge."""
    from jrlhf.auto import AutoModelForCausalLM
    from jrlhf.sharding.mesh import make_mesh
    from jrlhf.trainers import online

    mesh, dtype = make_mesh(cfg.mesh), "bfloat16" if cfg.bf16 else "float32"
    model = AutoModelForCausalLM.from_pretrained(cfg.model_name_or_path, mesh=mesh, dtype=dtype)
    engine = online.make_engine(
        model, model.tokenizer, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
        eos_token_ids=online.eos_ids(model, model.tokenizer), rows=cfg.rows,
    )  # fmt: skip
    judge = online.reward_model(
        cfg.reward_model_path, model.tokenizer, mesh=mesh, rows=cfg.rows, dtype=dtype
    )
    return model, engine, judge


def main(argv: list[str]) -> int:
    (cfg,) = parse(argv, LabelConfig, verb="label")
    if cfg.num_generations < 2:
        raise ConfigError(f"num_generations={cfg.num_generations}: a pair needs at least 2.")
    from jrlhf.commands.scoring import check_output, rewards_of, say_sampled, texts_of
    from jrlhf.data.encode import Encoder

    check_output(cfg.output)
    prompts = texts_of(cfg.dataset_name, "prompt", name="prompts")[: cfg.max_prompts]
    model, engine, judge = parts(cfg)
    group = cfg.num_generations
    ids = [row.tolist() for row in Encoder(model.tokenizer).texts(prompts) for _ in range(group)]
    done = engine.generate(
        model.params, ids, seed=cfg.seed, role="label", progress=say_sampled("policy")
    )
    scores = rewards_of(judge, model.tokenizer, ids, done)
    target = Path(cfg.output)
    written = 0
    with target.open("w", encoding="utf-8") as file:
        for i, prompt in enumerate(prompts):
            mine = range(i * group, (i + 1) * group)
            best, worst = max(mine, key=lambda j: scores[j]), min(mine, key=lambda j: scores[j])
            if scores[best] == scores[worst]:
                continue
            row = {"prompt": prompt, "chosen": done[best].text, "rejected": done[worst].text,
                   "margin": float(scores[best] - scores[worst])}  # fmt: skip
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    print(f"Wrote {written} pairs to {target}.")
    return 0
