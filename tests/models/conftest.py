"""Tiny checkpoints on disk, and the real models (skipped with the reason where absent)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import pytest
from safetensors.numpy import save_file

import jrlhf.model
from jrlhf.models.families import family_of, spec_from_config
from tests.models.quick import quick_jit

# No two sizes alike, so that a swapped axis cannot fit; heads 4 of 6, so that hidden != heads * e.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Tensors = dict[str, np.ndarray]
HFDirectory = Callable[..., tuple[Path, Tensors]]


def tensors_of(config: dict[str, Any], *, dtype: str = "float32", **choices: Any) -> Tensors:
    """Random tensors under the names that a checkpoint of this config has."""
    spec = spec_from_config(config, **choices)
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(0, 0.3, row.hf_shape).astype(np.float32).astype(dtype)
        for row in family_of(spec).weights(spec)
        for name, _, _ in row.places(spec)
    }


def write_hf(path: Path, config: dict[str, Any], tensors: Tensors, *, shards: int = 1) -> Path:
    """Writes a model directory with nothing but numpy and the safetensors package."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in names[i::shards]}, path / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.fixture
def hf_directory(tmp_path: Path) -> HFDirectory:
    """Makes a tiny random checkpoint; keyword arguments change its config."""

    def make(
        *, dtype: str = "float32", shards: int = 1, choices: dict[str, Any] | None = None, **changes
    ) -> tuple[Path, Tensors]:
        config = CONFIG | changes
        tensors = tensors_of(config, dtype=dtype, **(choices or {}))
        return write_hf(tmp_path / "origin", config, tensors, shards=shards), tensors

    return make


@pytest.fixture
def hf_tensors(tmp_path: Path) -> Callable[..., tuple[Path, Tensors]]:
    """Makes a random checkpoint of any family's config."""

    def make(config: dict[str, Any], **choices: Any) -> tuple[Path, Tensors]:
        tensors = tensors_of(config, **choices)
        return write_hf(tmp_path / "origin", config, tensors), tensors

    return make


@pytest.fixture
def quick_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of models are compiled with less care."""
    call: Any = jrlhf.model._forward
    quick = quick_jit(call.__wrapped__, static_argnames=("net", "mesh"))
    monkeypatch.setattr(jrlhf.model, "_forward", quick)
