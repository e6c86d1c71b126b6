"""One training run of each face, for the programs that it compiles: see test_vocabulary_memory.py.

python -m tests.trainers.vocabulary_programs FACE DIRECTORY
"""

from __future__ import annotations

import sys
import warnings

from jrlhf import (
    AutoModelForCausalLM,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from jrlhf.ops import logps
from tests.rollout.conftest import EOS, word_tokenizer

# A prime: an array whose size it divides has an axis of the vocabulary.
VOCAB, CHUNK, ROWS, LENGTH = 1009, 64, 8, 32
MODEL = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 2 * LENGTH,
    "eos_token_id": EOS,
}  # fmt: skip


def words(first: int, count: int) -> str:
    return " ".join(f"w{3 + n % (VOCAB - 3)}" for n in range(first, first + count))


TEXTS = [{"text": words(i, 40)} for i in range(ROWS)]
PAIRS = [
    {"prompt": words(i, 9), "chosen": " " + words(2 * i, 30), "rejected": " " + words(3 * i, 30)}
    for i in range(ROWS)
]
PROMPTS = [{"prompt": words(i, LENGTH // 2)} for i in range(ROWS)]


def reward(completions, **_):
    return [float(len(text)) for text in completions]


def main(face: str, directory: str) -> None:
    # Several chunks per batch, as models of size have.
    logps.CHUNK_BYTES = {"cpu": CHUNK * VOCAB * 4}
    tokenizer = word_tokenizer([f"w{i}" for i in range(3, VOCAB)])
    model = AutoModelForCausalLM.from_config(MODEL, tokenizer=tokenizer)
    common = {
        "output_dir": directory, "per_device_train_batch_size": ROWS, "max_steps": 1,
        "logging_steps": 1, "report_to": "none", "bf16": False,
    }  # fmt: skip
    offline = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": ROWS}
    given = {"model": model, "processing_class": tokenizer}
    made = {
        "sft": lambda: SFTTrainer(
            args=SFTConfig(max_length=LENGTH, **offline, **common),
            train_dataset=TEXTS, eval_dataset=TEXTS, **given,
        ),
        "dpo": lambda: DPOTrainer(
            args=DPOConfig(max_length=2 * LENGTH, **offline, **common),
            train_dataset=PAIRS, eval_dataset=PAIRS, **given,
        ),
        "ppo": lambda: PPOTrainer(
            args=PPOConfig(response_length=LENGTH // 2, **common),
            train_dataset=PROMPTS, reward_model=reward, **given,
        ),
        "grpo": lambda: GRPOTrainer(
            args=GRPOConfig(
                max_completion_length=LENGTH // 2, num_generations=2, beta=0.1, **common
            ),
            train_dataset=PROMPTS, reward_funcs=reward, **given,
        ),
    }  # fmt: skip
    made[face]().train()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
