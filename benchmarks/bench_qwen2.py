"""Forward pass and training step of a 28M Qwen2, against transformers on the same cores.

    python benchmarks/bench_qwen2.py [--quick] [--task forward step] [--dtype float32 bfloat16]

A forward pass gives the logits of every token; a step is loss, gradient, clip and AdamW. In
bfloat16 transformers' forward pass has bfloat16 weights and jrlhf's, by default, float32 ones that
it rounds layer by layer; a step has float32 masters on both sides (torch: autocast). transformers'
plain loop is the one of its tutorials, its Trainer what people run.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
from measure import TrainerSteps, arguments, cores, report, speedup, take_turns, write
from task import FULL as LLAMA
from task import QUICK as QUICK_LLAMA
from task import Size

# Two kv heads, as Qwen2's small models have.
FULL, QUICK = (dataclasses.replace(size, kv_heads=2) for size in (LLAMA, QUICK_LLAMA))
BASELINE = "transformers, plain loop"
RATE, CLIP = 2e-5, 1.0


def write_model(directory: Path, size: Size) -> Path:
    """A Hugging Face directory with random weights; biases and norms moved from 0 and 1."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=size.ffn,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(0.02 * torch.randn_like(weight), alpha=1.0 if "norm" in name else 2.0)
    model.save_pretrained(directory)
    return directory


def tokens(size: Size, count: int) -> np.ndarray:
    draw = np.random.default_rng(0)
    return draw.integers(3, size.vocab, (count, size.rows, size.length)).astype(np.int32)


# ------------------------------------------------------------------ transformers


def theirs_forward(model: Path, ids: np.ndarray, dtype: str) -> Callable[[], Any]:
    import torch
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    batch = torch.tensor(ids[0]).long()

    def run() -> Any:
        with torch.no_grad():
            return net(batch, use_cache=False).logits.float().numpy()

    return run


def theirs_step(model: Path, ids: np.ndarray, dtype: str) -> Callable[[], Any]:
    import torch
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.0)
    batches, turn = torch.tensor(ids).long(), iter(range(10**6))

    def run() -> float:
        batch = batches[next(turn) % len(batches)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = net(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def theirs_trainer(
    model: Path, ids: np.ndarray, dtype: str, *, work: Path, threads: int
) -> TrainerSteps:
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    rows = [{"input_ids": row.astype(np.int64), "labels": row.astype(np.int64)}
            for row in ids.reshape(-1, ids.shape[-1])]  # fmt: skip

    def make() -> Any:
        net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        net.config.use_cache = False
        args = TrainingArguments(
            output_dir=str(work), per_device_train_batch_size=ids.shape[1], learning_rate=RATE,
            max_steps=100_000, bf16=dtype == "bfloat16", use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_steps=10, max_grad_norm=CLIP,
        )  # fmt: skip
        return Trainer(model=net, args=args, train_dataset=rows)

    return peers.trainer_steps(make, threads=threads)


# ------------------------------------------------------------------ jrlhf


def ours_forward(
    model: Path, ids: np.ndarray, dtype: str, *, held: str = "float32"
) -> Callable[[], Any]:
    from jrlhf import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, param_dtype=held)
    return lambda: np.asarray(net(ids[0]).logits)


def ours_step(model: Path, ids: np.ndarray, dtype: str) -> Callable[[], Any]:
    """The step that every trainer runs, without a trainer around it."""
    import jax

    from jrlhf import AutoModelForCausalLM, SFTConfig
    from jrlhf.models.build import partition
    from jrlhf.rollout.score import Actor
    from jrlhf.sharding.mesh import make_mesh
    from jrlhf.sharding.place import params_shardings, put_batch
    from jrlhf.train.optim import make_optimizer
    from jrlhf.train.state import new_state, state_shardings
    from jrlhf.train.step import make_step

    mesh = make_mesh("data=1", devices=jax.devices()[:1])
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, mesh=mesh)
    args = SFTConfig(output_dir="unused", learning_rate=RATE, lr_scheduler_type="constant")
    trainable, frozen = partition(loaded.params, loaded.net)
    axes = partition(loaded.net.axes(), loaded.net)[0]
    tx, schedule = make_optimizer(args, 1000, axes=axes)
    placed = params_shardings(loaded.net, trainable, mesh)
    shardings = state_shardings(tx, trainable, placed)
    actor = Actor(loaded.net)
    loss = functools.partial(actor.loss, args)
    step = make_step(loss, tx, max_grad_norm=CLIP, mesh=mesh, shardings=shardings,
                     schedule=schedule)  # fmt: skip
    held = [new_state(trainable, tx, shardings=shardings)]
    mask = np.ones(ids.shape[1:], np.float32)
    mask[:, 0] = 0
    lengths, turn = np.full(ids.shape[1], ids.shape[2], np.int32), iter(range(10**6))

    def run() -> float:
        batch = {"ids": ids[next(turn) % len(ids)], "lengths": lengths, "mask": mask}
        held[0], metrics = step(held[0], frozen, put_batch(mesh, batch))
        jax.block_until_ready(held[0].params)
        return float(metrics["loss"])

    return run


CONTENDERS: dict[str, dict[str, Callable[..., Any]]] = {
    "forward": {
        "transformers, plain loop": theirs_forward,
        "jrlhf": ours_forward,
        "jrlhf (bfloat16 weights)": functools.partial(ours_forward, held="bfloat16"),
    },
    "step": {
        "transformers, plain loop": theirs_step,
        "transformers.Trainer": theirs_trainer,
        "jrlhf": ours_step,
    },
}


def compare(task: str, dtype: str, size: Size, model: Path, options: Any, threads: int) -> Any:
    """One table; all contenders give the same numbers, or it is no comparison."""
    ids = tokens(size, 4)
    runs: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        for name, build in CONTENDERS[task].items():
            if dtype == "float32" and "bfloat16" in name:
                continue
            if not options.only or name in (BASELINE, *options.only):
                more = {"work": Path(work), "threads": threads} if build is theirs_trainer else {}
                runs[name] = build(model, ids, dtype, **more)
        apart = difference(runs)
        times = take_turns(runs, rounds=options.rounds, clock=options.clock, warm=True)
        for run in runs.values():
            getattr(run, "close", lambda: None)()
    count = size.rows * size.length
    return [
        {
            "task": task,
            "dtype": dtype,
            "contender": name,
            "tokens/s": count / timing.median,
            "median s": timing.median,
            "best s": timing.best,
            "x transformers": speedup(times, name, BASELINE),
            "apart": apart.get(name),
        }
        for name, timing in times.items()
    ]


def difference(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """How far the first results (logits, or the first loss) lie from the baseline's."""
    found = {name: run() for name, run in runs.items() if not isinstance(run, TrainerSteps)}
    wanted = np.asarray(found.pop(BASELINE), np.float64)
    scale = np.abs(wanted).max()
    return {name: float(np.abs(np.asarray(x) - wanted).max() / scale) for name, x in found.items()}


def main() -> None:
    names = dict.fromkeys(name for task in CONTENDERS.values() for name in task)
    parser = arguments(__doc__.splitlines()[0], contenders=names)
    parser.add_argument("--task", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    options.rounds = options.rounds or (3 if options.quick else 9)
    peers.quiet()
    threads = peers.use_threads(options.torch_threads or cores())
    results = []
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(Path(directory), size)
        for task in options.task:
            for dtype in options.dtype:
                rows = compare(task, dtype, size, model, options, threads)
                report(f"{task}, {dtype}, {size.rows} x {size.length} tokens", rows)
                results += rows
    write("qwen2", options, results, size=vars(size), torch_threads=threads)


if __name__ == "__main__":
    main()
