"""The same losses and gradients as TRL 1.16's own code, on the same numbers.

The trainers' loss methods run as they are; only the model's forward pass is replaced by given
log-probs, which are leaves of the gradient. TRL takes one micro-batch on one process here: where
it would divide per micro-batch, its answer for the whole batch is the one to match.
"""

from __future__ import annotations

import types
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.algos import DPO, GRPO, SFT, Reward

pytestmark = pytest.mark.parity

ALONE = types.SimpleNamespace(
    num_processes=1,
    device="cpu",
    parallelism_config=None,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


def trainer(name: str, **attributes: Any) -> Any:
    """A trainer of TRL without its set-up: what its loss method reads, and nothing else."""
    import trl

    made = object.__new__(getattr(trl, name))
    common = {
        "accelerator": ALONE,
        "model": types.SimpleNamespace(training=True),
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "current_gradient_accumulation_steps": 1,
    }
    made.__dict__.update({**common, **attributes})
    return made


def leaf(x: np.ndarray) -> Any:
    import torch

    return torch.tensor(x, requires_grad=True)


def check_metrics(loss: Any, theirs: dict[str, list], *, rtol: float = 1e-4) -> None:
    """Every metric of ours that TRL has, has its value; TRL has them all."""
    for name, metric in loss.metrics.items():
        expected = float(theirs[name][0])
        np.testing.assert_allclose(
            metric.value(), expected, rtol=rtol, atol=1e-6, err_msg=f"metric {name}"
        )


def test_sft(examples, evaluate, rng):
    import torch
    from trl.trainer.utils import FusedCausalLMOutput

    out, batch = examples["sft"](rng)
    logps = leaf(out["logps"])
    output = FusedCausalLMOutput(
        log_probs=logps,
        entropy=torch.tensor(out["entropy"]),
        is_top1=torch.tensor(out["correct"]) > 0,
        label_mask=torch.tensor(batch["mask"]) > 0,
    )
    sft = trainer(
        "SFTTrainer",
        args=types.SimpleNamespace(loss_type="nll", average_tokens_across_devices=True),
        compute_loss_func=None,
        label_smoother=None,
    )
    theirs = sft.compute_loss(lambda **_: output, {"attention_mask": torch.tensor(batch["mask"])})
    theirs.backward()
    loss, gradient = evaluate(SFT(), out, batch)
    np.testing.assert_allclose(loss.objective.value(), theirs.item(), rtol=1e-6)
    ours = gradient["logps"] / float(loss.objective.weight)
    # TRL's head gives zeros without gradient at masked tokens; here they are leaves.
    np.testing.assert_allclose(ours, logps.grad.numpy() * batch["mask"], rtol=1e-5, atol=1e-8)
    check_metrics(loss, sft._metrics["train"])


@pytest.mark.parametrize("coefficient", [None, 0.01])
@pytest.mark.parametrize("with_margin", [True, False])
def test_reward(examples, evaluate, rng, coefficient, with_margin):
    import torch

    out, batch = examples["reward"](rng)
    scores = leaf(out["scores"].T.reshape(-1, 1).copy())  # TRL's rows: all chosen, all rejected
    inputs = {"attention_mask": torch.ones(1)}
    model = types.SimpleNamespace(logits=scores)
    if with_margin:
        inputs["margin"] = torch.tensor(batch["margin"])
    else:
        del batch["margin"]
    args = types.SimpleNamespace(center_rewards_coefficient=coefficient)
    reward = trainer("RewardTrainer", args=args)
    theirs = reward.compute_loss(lambda **_: model, inputs)
    theirs.backward()
    loss, gradient = evaluate(Reward(center_rewards_coefficient=coefficient), out, batch)
    np.testing.assert_allclose(loss.objective.value(), theirs.item(), rtol=1e-5)
    ours = gradient["scores"].T.reshape(-1, 1) / float(loss.objective.weight)
    np.testing.assert_allclose(ours, scores.grad.numpy(), rtol=1e-4, atol=1e-7)
    check_metrics(loss, reward._metrics["train"])


@pytest.mark.parametrize(
    "algorithm", [DPO(beta=0.3), DPO(beta=0.3, loss_type="robust", label_smoothing=0.2)], ids=str
)
def test_dpo(examples, evaluate, rng, algorithm):
    import torch
    from trl.trainer.utils import FusedCausalLMOutput

    out, batch = examples["dpo"](rng)

    def rows(x: np.ndarray) -> np.ndarray:
        """[b 2 s] to TRL's [2b s], all chosen first."""
        return np.ascontiguousarray(np.swapaxes(x, 0, 1).reshape(-1, x.shape[-1]))

    logps, mask = leaf(rows(out["logps"])), rows(batch["mask"])
    blank = torch.zeros_like(logps)
    output = FusedCausalLMOutput(
        log_probs=logps,
        entropy=torch.tensor(rows(out["entropy"])),
        is_top1=torch.tensor(rows(out["correct"])) > 0,
        mean_logits=blank,
        log_sum_sq_probs=blank,
    )
    ref = torch.tensor((batch["ref_logps"] * batch["mask"]).sum(-1))
    whole = torch.tensor(np.pad(mask, [(0, 0), (1, 0)])).long()  # TRL's masks start with a prompt
    inputs = {
        "input_ids": whole,
        "attention_mask": whole,
        "completion_mask": whole,
        "ref_chosen_logps": ref[:, 0],
        "ref_rejected_logps": ref[:, 1],
    }
    dpo = trainer(
        "DPOTrainer",
        precompute_ref_logps=True,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[algorithm.loss_type],
        loss_weights=[1.0],
        beta=algorithm.beta,
        label_smoothing=algorithm.label_smoothing,
        use_weighting=False,
    )
    theirs = dpo._compute_loss(lambda **_: output, inputs, return_outputs=False)
    theirs.backward()
    loss, gradient = evaluate(algorithm, out, batch)
    np.testing.assert_allclose(loss.objective.value(), theirs.item(), rtol=1e-5)
    ours = rows(gradient["logps"]) / float(loss.objective.weight)
    np.testing.assert_allclose(ours, logps.grad.numpy() * mask, rtol=1e-4, atol=1e-7)
    check_metrics(loss, dpo._metrics["train"])


GRPO_SETTINGS = [
    {"loss_type": "grpo", "beta": 0.1},
    {"loss_type": "bnpo", "epsilon_high": 0.4, "beta": 0.1, "use_bias_correction_kl": False},
    {"loss_type": "dapo", "delta": 1.3},
    {"loss_type": "dapo", "beta": 0.1, "mask_truncated_completions": True},
    {"loss_type": "dr_grpo", "mask_truncated_completions": True},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "beta": 0.1},
]


@pytest.mark.parametrize("settings", GRPO_SETTINGS, ids=str)
def test_grpo(examples, evaluate, rng, settings):
    import torch

    algorithm = GRPO(num_generations=4, max_completion_length=6, **settings)
    out, batch = examples["grpo"](rng)
    batch["terminated"][:] = 1
    if algorithm.mask_truncated_completions:
        batch["terminated"][1] = 0
    batch = {
        k: np.asarray(v)
        for k, v in jax.jit(algorithm.credit)({k: jnp.array(v) for k, v in batch.items()}).items()
    }
    # TRL zeroes the mask of truncated completions when it makes the batch.
    mask = batch["mask"]
    if algorithm.mask_truncated_completions:
        mask = mask * batch["terminated"][:, None]
    logps, entropy = leaf(out["logps"]), torch.tensor(out["entropy"])
    grpo = trainer(
        "GRPOTrainer",
        args=types.SimpleNamespace(
            delta=algorithm.delta,
            use_bias_correction_kl=algorithm.use_bias_correction_kl,
            steps_per_generation=1,
        ),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropy, None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=algorithm.importance_sampling_level,
        beta=algorithm.beta,
        loss_type=algorithm.loss_type,
        epsilon_low=algorithm.epsilon,
        epsilon_high=algorithm.epsilon_high or algorithm.epsilon,
        use_vllm=False,
        max_completion_length=algorithm.max_completion_length,
        _entropy_bonus_enabled=False,
    )
    ids = torch.zeros(mask.shape, dtype=torch.long)
    theirs = grpo._compute_loss(
        None,
        {
            "prompt_ids": ids,
            "prompt_mask": ids,
            "completion_ids": ids,
            "completion_mask": torch.tensor(mask),
            "advantages": torch.tensor(batch["advantages"][:, 0]),
            "old_per_token_logps": torch.tensor(batch["old_logps"]),
            "ref_per_token_logps": torch.tensor(batch["ref_logps"]),
            "num_items_in_batch": torch.tensor(mask.sum()),
        },
    )
    theirs.backward()
    loss, gradient = evaluate(algorithm, out, batch)
    np.testing.assert_allclose(loss.objective.value(), theirs.item(), rtol=1e-4)
    ours = gradient["logps"] / float(loss.objective.weight)
    np.testing.assert_allclose(ours, logps.grad.numpy(), rtol=1e-4, atol=1e-7)
    check_metrics(loss, grpo._metrics["train"])
    if algorithm.beta == 0:
        assert "kl" not in loss.metrics


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_advantages_of_a_real_trainer(tmp_path, scale):
    """A whole TRL trainer with a two-layer model generates and scores eight completions."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    config = LlamaConfig(vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                         num_attention_heads=2, pad_token_id=0, eos_token_id=1)  # fmt: skip
    rewards = [1.0, 2.5, -3.0, None, 7.0, 7.0, 7.0, 7.5]
    prompts = [{"prompt": "a b"}] * 4 + [{"prompt": "b c"}] * 4
    grpo = trl.GRPOTrainer(
        model=LlamaForCausalLM(config),
        reward_funcs=lambda completions, **_: rewards,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=8, num_generations=4, max_completion_length=3,
            scale_rewards=scale, report_to=[],
        ),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
    )  # fmt: skip
    theirs = grpo._generate_and_score_completions(prompts)["advantages"].numpy()
    algorithm = GRPO(num_generations=4, scale_rewards=scale)
    batch = {
        "rewards": jnp.array([np.nan if r is None else r for r in rewards], jnp.float32),
        "mask": jnp.ones((8, 3)),
        "lengths": jnp.full(8, 5),
    }
    ours = algorithm.credit(batch)["advantages"]
    np.testing.assert_allclose(ours[:, 0], theirs, rtol=1e-4, atol=1e-5)
    for name, metric in algorithm.rollout_metrics(batch).items():
        expected = grpo._metrics["train"][name][0]
        np.testing.assert_allclose(metric.value(), expected, rtol=1e-5, err_msg=name)
