"""Every family takes adapters by the names of its own checkpoints."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from jrlhf.errors import ConfigError
from jrlhf.models.build import Net
from jrlhf.models.families import DECODERS, spec_from_config
from jrlhf.models.load import flatten
from jrlhf.models.lora import files, tree
from jrlhf.models.lora.config import LoraConfig
from tests.models.test_families import FLAGS, config


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("family", sorted(DECODERS))
def test_an_adapter_on_every_linear_map_is_written_and_read_back(
    family: str, flagged: bool, tmp_path: Path
) -> None:
    base = Net(spec_from_config(config(family, **(FLAGS.get(family, {}) if flagged else {}))))
    plan = base.adapter(LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    own = flatten(Net(base.spec, (plan,)).abstract()[tree.KEY]["default"])
    rng = np.random.default_rng(0)
    leaves = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in own.items()}
    rows = tree.weights(base.spec)
    files.write(tmp_path, leaves, plan, rows, beside={})
    shapes = {path: leaf.shape for path, leaf in own.items()}
    again, beside = files.read(tmp_path, plan, rows, shapes, tree.tied_head(base.spec))
    assert again.keys() == leaves.keys()
    assert not beside
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(again[path], leaf)
    # Each adapted map is a tensor of the checkpoint, with one A and one B.
    names = {name for row, places in rows for name, _, _ in places}
    modules = {name for target in plan.targets for name in target.names}
    assert {f"{module}.weight" for module in modules} <= names
    written = files.assemble(leaves, plan, rows)
    assert len(written) == 3 * len(modules)


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_orthogonal_parts_of_fused_maps_have_one_matrix(family: str) -> None:
    base = Net(spec_from_config(config(family)))
    plan = base.adapter(LoraConfig(target_modules="all-linear", init_lora_weights="orthogonal"))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), base.abstract())
    own = flatten(tree.init(plan, zeros, jax.random.key(0)))
    leaves = {path: np.asarray(leaf) for path, leaf in own.items()}
    written = files.assemble(leaves, plan, tree.weights(base.spec))
    pairs = [(v, written[n.replace("_A", "_B")]) for n, v in written.items() if "lora_A" in n]
    assert any(target.source for target in plan.targets)
    assert pairs
    for a, b in pairs:
        assert np.abs(b @ a).max() < 1e-6 < 0.05 < min(a.std(), b.std())


def test_plain_mlps_between_experts_are_left_alone() -> None:
    """PEFT takes their names for the experts' parameters, so no file could say them."""
    base = Net(spec_from_config(config("qwen3_moe", mlp_only_layers=[1])))
    plan = base.adapter(LoraConfig(target_modules="all-linear"))
    assert {name.split(".")[3] for target in plan.targets for name in target.names} == {"self_attn"}
    with pytest.raises(ConfigError, match="'gate_proj' is no linear map of this qwen3_moe"):
        base.adapter(LoraConfig(target_modules=["q_proj", "gate_proj"]))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *[("mixtral", name) for name in ("w1", "experts", "gate", "gate_up_proj")],
        *[("qwen3_moe", name) for name in ("gate_proj", "down_proj", "experts", "gate")],
        *[("gpt_oss", name) for name in ("gate_up_proj", "down_proj", "experts", "router")],
    ],
)
def test_experts_and_routers_are_refused_by_name(family: str, name: str) -> None:
    base = Net(spec_from_config(config(family)))
    with pytest.raises(ConfigError, match=f"'{name}' is no linear map of this {family}"):
        base.adapter(LoraConfig(target_modules=["q_proj", name]))
