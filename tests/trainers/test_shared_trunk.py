"""trlX's hydra: with num_layers_unfrozen the reference has no lower layers of its own."""

from __future__ import annotations

import gc

import jax
import numpy as np

from jrlhf import AutoModelForCausalLM, DPOConfig, DPOTrainer
from jrlhf.models.build import combine
from tests.rollout.conftest import word_tokenizer

WORDS = [f"w{i}" for i in range(20)]
# Sizes that no other test has: live arrays are found by their shapes.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 28,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
}


def alive(shape: tuple[int, ...]) -> int:
    """How many different buffers of this shape the devices hold."""
    gc.collect()
    arrays = [x for x in jax.live_arrays() if x.shape == shape and not x.is_deleted()]
    return len({x.addressable_shards[0].data.unsafe_buffer_pointer() for x in arrays})


def test_the_reference_shares_the_frozen_trunk_and_the_embedding() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG, tokenizer=word_tokenizer(WORDS))
    rows = [{"prompt": "w1 w2", "chosen": f"w{i} w3", "rejected": f"w4 w{i}"} for i in range(16)]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir="hydra", num_layers_unfrozen=1, max_steps=2, learning_rate=0.1,
                       per_device_train_batch_size=1, logging_steps=1, save_strategy="no"),
        train_dataset=rows,
    )  # fmt: skip
    frozen = trainer._frozen
    trainer.train()
    assert set(frozen) == {"trunk", "embed"}
    policy, reference = trainer.model.params, combine(trainer._reference, frozen)
    for name in ("trunk", "embed"):
        for leaves in zip(*map(jax.tree.leaves, (policy[name], reference[name])), strict=True):
            assert leaves[0] is leaves[1]
    # One trunk [3 d f] in memory, however many models; of the trained layer the policy's, the
    # reference's and two moments.
    assert alive((3, 28, 44)) == 2, "gate and up, once each"
    assert alive((1, 28, 44)) == 2 * 4
    # The reference is what the policy was, and the policy has moved away from it.
    start = np.asarray(model.params["layers"]["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(reference["layers"]["mlp"]["up"]["kernel"], start[3:])
    np.testing.assert_array_equal(reference["trunk"]["mlp"]["up"]["kernel"], start[:3])
    assert np.abs(policy["layers"]["mlp"]["up"]["kernel"] - start[3:]).max() > 1e-3


def test_another_spec_with_the_same_trunk_copies_nothing() -> None:
    model = AutoModelForCausalLM.from_config({**CONFIG, "hidden_size": 12})
    changed = model.respec(remat="full", dtype="bfloat16")
    pairs = zip(jax.tree.leaves(model.params), jax.tree.leaves(changed.params), strict=True)
    assert all(a is b for a, b in pairs)
