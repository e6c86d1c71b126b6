"""Example batches for every algorithm, and the enrolment of each in the shared battery."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.algos import ALGORITHMS
from jrlhf.types import Loss, Outputs

ROWS, TOKENS = 8, 6

# Hyperparameters worth a battery of their own, by algorithm; {} is the default.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "sft": [{}],
    "reward": [{}, {"center_rewards_coefficient": 0.1}],
    "dpo": [{}, {"loss_type": "robust", "label_smoothing": 0.1}],
    "ppo": [{}, {"kl_estimator": "k3", "whiten_rewards": True, "missing_eos_penalty": 1.0}],
    "grpo": [
        {"beta": 0.1},
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
        {"loss_type": "bnpo", "delta": 1.5, "scale_rewards": "batch"},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "mask_truncated_completions": True},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_high": 0.3,
         "mask_truncated_completions": True},
    ],
}  # fmt: skip
# Small groups for eight rows.
FIXED = {"grpo": {"num_generations": 4, "max_completion_length": TOKENS}}


def ragged(rng: np.random.Generator, rows: int, tokens: int) -> np.ndarray:
    """A mask with rows of 1 to `tokens` ones, at least one row full."""
    lengths = rng.integers(1, tokens + 1, rows)
    lengths[0] = tokens
    return (np.arange(tokens) < lengths[:, None]).astype(np.float32)


def per_token(rng: np.random.Generator, mask: np.ndarray, scale: float = 1.0) -> np.ndarray:
    return (rng.normal(size=mask.shape) * scale * mask).astype(np.float32)


def example_sft(rng, rows=ROWS, tokens=TOKENS):
    mask = ragged(rng, rows, tokens)
    return outputs(rng, mask), {"mask": mask, "lengths": mask.sum(1).astype(np.int32)}


def example_pairs(rng, rows=ROWS, tokens=TOKENS):
    mask = ragged(rng, 2 * rows, tokens).reshape(rows, 2, tokens)
    batch = {
        "mask": mask,
        "lengths": mask.sum(-1).astype(np.int32),
        "margin": rng.random(rows).astype(np.float32),
    }
    out = outputs(rng, mask)
    out["scores"] = rng.normal(size=(rows, 2)).astype(np.float32)
    # Margins of both signs and of order one, so that no loss is saturated.
    batch["ref_logps"] = (out["logps"] + per_token(rng, mask, 2.0)).astype(np.float32)
    return out, batch


def example_rollout(rng, rows=ROWS, tokens=TOKENS):
    mask = ragged(rng, rows, tokens)
    out = outputs(rng, mask)
    batch = {
        "mask": mask,
        "lengths": (mask.sum(1) + 3).astype(np.int32),
        "old_logps": (out["logps"] + per_token(rng, mask, 0.3)).astype(np.float32),
        "ref_logps": (out["logps"] + per_token(rng, mask, 0.5)).astype(np.float32),
        "values": per_token(rng, mask),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminated": (np.arange(rows) % 3 != 1).astype(np.float32),
    }
    out["values"] = (batch["values"] + per_token(rng, mask, 0.3)).astype(np.float32)
    return out, batch


def outputs(rng, mask):
    return {
        "logps": (-np.abs(per_token(rng, mask, 2.0))).astype(np.float32),
        "entropy": np.abs(per_token(rng, mask)),
        "correct": ((rng.random(mask.shape) < 0.5) * mask).astype(np.float32),
    }


EXAMPLES = {
    "sft": example_sft,
    "reward": example_pairs,
    "dpo": example_pairs,
    "ppo": example_rollout,
    "grpo": example_rollout,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One algorithm with one setting, and how to make and judge a batch for it."""

    name: str
    settings: dict[str, Any]

    @property
    def algorithm(self) -> Any:
        return ALGORITHMS[self.name](**{**FIXED.get(self.name, {}), **self.settings})

    def example(self, seed: int = 0) -> tuple[dict, dict]:
        """Outputs and batch as NumPy arrays, the batch with its credit."""
        out, batch = EXAMPLES[self.name](np.random.default_rng(seed))
        return out, self.credit(batch)

    def credit(self, batch: dict) -> dict:
        if not hasattr(self.algorithm, "credit"):
            return batch
        credited = jax.jit(self.algorithm.credit)({k: jnp.array(v) for k, v in batch.items()})
        return {k: np.asarray(v) for k, v in credited.items()}

    def __str__(self) -> str:
        settings = ",".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.name}({settings})"


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(algorithm: Any, out: dict, batch: dict) -> tuple[Loss, dict]:
    def total(out: dict) -> tuple[jax.Array, Loss]:
        loss = algorithm.loss(Outputs(**out), batch)
        return loss.objective.total, loss

    gradient, loss = jax.grad(total, has_aux=True)(out)
    return loss, gradient


def evaluate(algorithm: Any, out: dict, batch: dict) -> tuple[Loss, dict[str, np.ndarray]]:
    """The loss, and the gradient of its total by every output that carries one."""
    arrays = [{k: jnp.array(v) for k, v in part.items()} for part in (out, batch)]
    loss, gradient = _evaluate(algorithm, *arrays)
    return loss, {k: np.asarray(v) for k, v in gradient.items()}


CASES = [Case(name, settings) for name in ALGORITHMS for settings in VARIANTS.get(name, [{}])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `case` runs for every algorithm of the registry."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def examples() -> dict[str, Callable]:
    return EXAMPLES


@pytest.fixture(name="evaluate", scope="session")
def _evaluate_fixture() -> Callable:
    return evaluate


@pytest.fixture(scope="session")
def central_differences() -> Callable:
    """∂f/∂x of a float64 function of one array, where it counts."""

    def differentiate(f: Callable, x: np.ndarray, step: float = 1e-6) -> np.ndarray:
        x = np.array(x, np.float64)
        gradient = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            high, low = x.copy(), x.copy()
            high[i] += step
            low[i] -= step
            gradient[i] = (f(high) - f(low)) / (2 * step)
        return gradient

    return differentiate
