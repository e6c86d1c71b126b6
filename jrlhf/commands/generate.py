"""`jrlhf generate`: completions of prompts, printed or as JSONL."""

from __future__ import annotations

from typing import Any

from jrlhf.commands.arguments import parse
from jrlhf.config import check_counts, config
from jrlhf.errors import ConfigError


@config
class GenerateConfig:
    """What to continue, and how.

    Attributes:
        model_name_or_path: the model.
        prompt: one prompt.
        dataset_name: rows with a column prompt (text or messages), instead of `prompt`.
        chat: treat `prompt` as a user's turn and apply the chat template.
        output: JSONL of prompt and completion; None: print.
        max_new_tokens: longest completion.
        do_sample: False takes the most probable tokens.
        temperature: of sampling.
        top_k, top_p, min_p, repetition_penalty: 0, 1, 0 and 1 are off.
        stop_strings: a completion ends after any of these.
        rows: rows per call of the sampler.
        seed: of the samples.
        mesh: device mesh, as everywhere.
        dtype: compute type.
    """

    model_name_or_path: str
    prompt: str | None = None
    dataset_name: str | None = None
    chat: bool = False
    output: str | None = None
    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_strings: list[str] | None = None
    rows: int = 32
    seed: int = 0
    mesh: dict[str, int] | str | None = None
    dtype: str = "float32"

    OF_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    SYNONYMS = {"model": "model_name_or_path", "dataset": "dataset_name"}

    def __post_init__(self) -> None:
        check_counts(self, "max_new_tokens", "rows")
        if (self.prompt is None) == (self.dataset_name is None):
            raise ConfigError("jrlhf generate needs one of --prompt and --dataset_name.")
        for name, off in self.OF_SAMPLING.items() if not self.do_sample else ():
            if getattr(self, name) != off:
                raise ConfigError(f"--{name} acts only when sampling: add --do_sample.")
        if self.chat and self.prompt is None:
            raise ConfigError("--chat goes with --prompt: a dataset's messages are chats already.")


def rows_of(cfg: GenerateConfig) -> Any:
    """The prompts as a dataset."""
    from jrlhf.data.sources import load_rows

    if cfg.dataset_name is not None:
        return load_rows(cfg.dataset_name)
    turn = [{"role": "user", "content": cfg.prompt}]
    return load_rows([{"prompt": turn if cfg.chat else cfg.prompt}])


def load(cfg: GenerateConfig) -> Any:
    """The model, on the mesh."""
    from jrlhf.auto import AutoModelForCausalLM
    from jrlhf.sharding.mesh import make_mesh

    options: Any = {"mesh": make_mesh(cfg.mesh), "dtype": cfg.dtype}
    return AutoModelForCausalLM.from_pretrained(cfg.model_name_or_path, **options)


def sampler(cfg: GenerateConfig, model: Any, *, count: int) -> Any:
    """The engine for `count` prompts."""
    from jrlhf.rollout.engine import Engine
    from jrlhf.rollout.sampling import SamplingParams
    from jrlhf.trainers import online, setup

    sampling = SamplingParams(
        max_new_tokens=cfg.max_new_tokens, do_sample=cfg.do_sample, temperature=cfg.temperature,
        repetition_penalty=cfg.repetition_penalty, top_k=cfg.top_k, top_p=cfg.top_p,
        min_p=cfg.min_p, pad_token_id=setup.pad_id(model.tokenizer),
        eos_token_ids=tuple(online.eos_ids(model, model.tokenizer)),
    )  # fmt: skip
    return Engine(model.decoder, model.tokenizer, sampling, mesh=model.mesh,
                  rows=min(cfg.rows, count), stop_strings=cfg.stop_strings or ())  # fmt: skip


def main(argv: list[str]) -> int:
    (cfg,) = parse(argv, GenerateConfig, verb="generate")
    rows = rows_of(cfg)
    from jrlhf.commands.scoring import check_output, write_lines
    from jrlhf.data.tokenize import prompt_rows

    if cfg.output is not None:
        check_output(cfg.output)  # before the work
    model = load(cfg)
    prompts: Any = prompt_rows(rows, model.tokenizer, name="prompts")
    done = sampler(cfg, model, count=len(prompts)).generate(
        model.params, [row["ids"].tolist() for row in prompts], seed=cfg.seed, role="generate"
    )
    if cfg.output is None:
        print(*(completion.text for completion in done), sep="\n")
        return 0
    pairs = [{"prompt": row["prompt"], "completion": completion.text}
             for row, completion in zip(prompts, done, strict=True)]  # fmt: skip
    write_lines(cfg.output, pairs)
    print(f"Wrote {len(pairs)} completions to {cfg.output}.")
    return 0
