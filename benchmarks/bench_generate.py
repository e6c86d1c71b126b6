"""Generation: new tokens per second, jrlhf against transformers' `generate`, by batch size.

    python benchmarks/bench_generate.py [--quick] [--batch 8 32] [--new-tokens 64 128]

Both sides sample at temperature 1 from the whole vocabulary, prompts of one length, and no EOS, so
that every row has exactly the new tokens asked for.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
from measure import arguments, report, speedup, take_turns, write
from task import FULL, QUICK, Size, Texts, write_checkpoint

BASELINE = "transformers.generate"


def prompts(size: Size, rows: int, length: int) -> list[list[int]]:
    texts = Texts(size)
    return [[int(word[1:]) for word in texts.words(length).split()] for _ in range(rows)]


def of_transformers(
    model: Path, ids: list[list[int]], *, new_tokens: int, dtype: str
) -> Callable[[], None]:
    """`generate` with its key-value cache; weights in the compute dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    with contextlib.redirect_stdout(None):
        module = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    module.generation_config.eos_token_id = None
    tokens = torch.tensor(ids)

    @torch.inference_mode()
    def run() -> None:
        out = module.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            pad_token_id=2,
        )
        assert out.shape[1] == tokens.shape[1] + new_tokens, out.shape

    return run


def of_jrlhf(
    model: Path, ids: list[list[int]], *, new_tokens: int, dtype: str
) -> Callable[[], None]:
    """The rollout engine: buckets, sampling, log-probs of every token, lists of ids back."""
    from jrlhf import AutoModelForCausalLM
    from jrlhf.rollout.engine import Engine
    from jrlhf.rollout.sampling import SamplingParams

    policy = AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype)
    engine = Engine(policy.net, None, SamplingParams(max_new_tokens=new_tokens), rows=len(ids))
    turn = iter(range(1_000_000))

    def run() -> None:
        done = engine.generate(policy.params, ids, seed=0, step=next(turn))
        assert all(len(completion.ids) == new_tokens for completion in done)

    begun = time.perf_counter()
    run()
    run.first = time.perf_counter() - begun  # type: ignore[attr-defined]
    return run


def compare(
    size: Size, model: Path, *, rows: int, new_tokens: int, dtype: str, rounds: int, clock: str
) -> list[dict[str, Any]]:
    ids = prompts(size, rows, size.length // 4)
    sides: dict[str, Callable[..., Callable[[], None]]] = {
        BASELINE: of_transformers,
        "jrlhf": of_jrlhf,
    }
    runs = {
        name: make(model, ids, new_tokens=new_tokens, dtype=dtype) for name, make in sides.items()
    }
    times = take_turns(runs, rounds=rounds, clock=clock)
    return [
        {
            "dtype": dtype,
            "batch": rows,
            "prompt": len(ids[0]),
            "new": new_tokens,
            "contender": name,
            "tokens/s": rows * new_tokens / timing.median,
            "median s": timing.median,
            "best s": timing.best,
            "x transformers": speedup(times, name, BASELINE),
            "first call s": getattr(runs[name], "first", None),
        }
        for name, timing in times.items()
    ]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=None)
    parser.add_argument("--new-tokens", type=int, nargs="+", default=None)
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    options.rounds = options.rounds or (3 if options.quick else 5)
    options.batch = options.batch or ([4] if options.quick else [8, 32])
    options.new_tokens = options.new_tokens or ([16] if options.quick else [64, 128])
    peers.quiet()
    threads = peers.use_threads(options.torch_threads)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        model = write_checkpoint(Path(directory), size)
        run = functools.partial(compare, size, model, rounds=options.rounds, clock=options.clock)
        for dtype in options.dtype:
            for rows in options.batch:
                for new_tokens in options.new_tokens:
                    results += run(rows=rows, new_tokens=new_tokens, dtype=dtype)
    report("generation", results)
    write("generate", options, results, size=vars(size), torch_threads=threads)


if __name__ == "__main__":
    main()
