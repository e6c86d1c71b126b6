"""Two processes load one checkpoint: each takes its own share of the files, and both save it back.

What is counted is what leaves the files: the bytes that `SafetensorsFile` copies out of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from jrlhf.models.load import load_pretrained
from jrlhf.models.save import save_pretrained
from tests.models.conftest import CONFIG, Tensors, tensors_of, write_hf
from tests.processes import finish, free_port

# Every large axis divides by four, so that nothing but norms and biases is kept whole.
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": CONFIG | SIZES | {"attention_bias": True},
    # Queries, keys and values lie in one tensor of the file, and so do gate and up.
    "phi3": CONFIG | SIZES | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]},
}
# The share of a process, which holds two of the four devices. "data" comes first of a mesh's axes:
# over it each process holds the whole model, once.
SHARES = {"fsdp=4": 0.5, "tensor=2,fsdp=2": 0.5, "data=2,fsdp=2": 1.0}

PROGRAM = """
    import json, sys
    from pathlib import Path
    from jrlhf.sharding.distributed import initialize
    initialize()
    import jax, numpy as np
    from safetensors.numpy import load_file
    from jrlhf import AutoModelForCausalLM
    from jrlhf.models.hf.safetensors_file import SafetensorsFile

    taken, read = [], SafetensorsFile.read
    def counting(*args, **named):
        part = read(*args, **named)
        taken.append(part.nbytes)
        return part
    SafetensorsFile.read = counting

    def check(family, params, files):
        plain = AutoModelForCausalLM.from_pretrained(root / family).params
        assert jax.tree.structure(plain) == jax.tree.structure(params)
        for ours, whole in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
            shards = {str(shard.index): shard for shard in ours.addressable_shards}.values()
            for shard in shards:
                np.testing.assert_array_equal(shard.data, np.asarray(whole)[shard.index])
        # And by hand what no table of ours tells.
        layers = params["layers"]["mlp"]
        up = "gate_up_proj.weight" if family == "phi3" else "up_proj.weight"
        by_hand = {
            "embed_tokens.weight": (params["embed"]["table"], lambda x: x),
            "layers.1.mlp.down_proj.weight": (layers["down"]["kernel"], lambda x: x.T),
            f"layers.1.mlp.{up}": (layers["up"]["kernel"], lambda x: x[-48:].T),
        }
        for name, (leaf, turned) in by_hand.items():
            wanted = turned(files[f"model.{name}"])
            for shard in leaf.addressable_shards:
                index, data = shard.index, np.asarray(shard.data)
                if leaf.ndim > wanted.ndim:
                    assert index[0] == slice(None)
                    index, data = index[1:], data[1]
                np.testing.assert_array_equal(data, wanted[index])

    root, found = Path(sys.argv[1]), {}
    for family in sys.argv[2].split():
        files = {}
        for path in (root / family).glob("*.safetensors"):
            files |= load_file(path)
        for mesh in sys.argv[3].split():
            del taken[:]
            model = AutoModelForCausalLM.from_pretrained(root / family, mesh=mesh)
            found[f"{family} {mesh}"] = sum(taken)
            check(family, model.params, files)
            model.save_pretrained(root / "saved" / family / mesh, max_shard_size="40KB")
    # To a file of its own: what Gloo says on stdout falls into the middle of lines.
    (root / f"read by {jax.process_index()}").write_text(json.dumps(found))
"""


def start(index: int, port: int, root: Path) -> subprocess.Popen[str]:
    checkout = str(Path(__file__).parents[2])
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([checkout, os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), root, " ".join(FAMILIES),
         " ".join(SHARES)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensors]]:
    """What two processes left behind, and the tensors that they loaded."""
    root = tmp_path_factory.mktemp("both")
    origin = {family: tensors_of(config) for family, config in FAMILIES.items()}
    for family, config in FAMILIES.items():
        write_hf(root / family, config, origin[family], shards=3)
    port = free_port()
    started = [start(index, port, root) for index in range(2)]
    finish(started, timeout=300)
    return root, origin


@pytest.mark.parametrize("mesh", SHARES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_process_reads_its_own_share_of_the_files(
    family: str, mesh: str, both: tuple[Path, dict[str, Tensors]]
) -> None:
    root, origin = both
    sizes = {name: (tensor.ndim, tensor.nbytes) for name, tensor in origin[family].items()}
    large = sum(n for ndim, n in sizes.values() if ndim > 1)
    small = sum(n for ndim, n in sizes.values() if ndim == 1)
    assert small < large / 20
    read = [json.loads((root / f"read by {i}").read_text())[f"{family} {mesh}"] for i in range(2)]
    for bytes_read in read:
        # Norms and biases are kept whole or cut: at most all of them, once.
        assert SHARES[mesh] * large <= bytes_read <= SHARES[mesh] * large + small
    # Between them nothing is left out.
    assert sum(read) >= large + small


@pytest.mark.parametrize("mesh", SHARES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_two_processes_save_is_the_origin_bit_by_bit(
    family: str, mesh: str, both: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    root, origin = both
    saved = root / "saved" / family / mesh
    files = sorted(path.name for path in saved.glob("*.safetensors"))
    assert len(files) > 1
    found: Tensors = {}
    for file in files:
        found |= load_file(saved / file)
    assert found.keys() == origin[family].keys()
    for name, tensor in origin[family].items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name
    # And the files are those that one process with one device writes.
    net, params, source = load_pretrained(root / family)
    save_pretrained(tmp_path, net, params, source=source, max_shard_size="40KB")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in saved.iterdir()
    )
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (saved / path.name).read_bytes(), path.name
