"""Where parameters, moments and rows land on the devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jrlhf.config import TrainingConfig
from jrlhf.errors import MeshError
from jrlhf.models.build import Net, partition
from jrlhf.models.spec import DecoderSpec
from jrlhf.sharding import place
from jrlhf.sharding.mesh import make_mesh
from jrlhf.train.optim import OPTIMIZERS, make_optimizer

MESH = "data=2,fsdp=2,tensor=2"
SPEC = DecoderSpec(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    attention_bias=True,
)


def test_a_models_parameters_lie_as_its_axes_say():
    mesh, net = make_mesh(MESH), Net(SPEC)
    shardings = place.params_shardings(net, net.abstract(), mesh)
    assert shardings["layers"]["attn"]["q"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert shardings["layers"]["mlp"]["down"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert shardings["embed"]["table"].spec == P("tensor", "fsdp")
    assert shardings["norm"]["scale"].spec == P()


def test_a_part_of_the_parameters_can_be_placed_alone():
    mesh, net = make_mesh(MESH), Net(SPEC.replace(trunk_layers=1))
    trainable, frozen = partition(net.abstract(), net)
    whole = place.params_shardings(net, net.abstract(), mesh)
    assert place.params_shardings(net, trainable, mesh) == {k: whole[k] for k in trainable}
    assert place.params_shardings(net, frozen, mesh) == {k: whole[k] for k in frozen}


@pytest.mark.parametrize("optim", sorted(OPTIMIZERS))
def test_every_moment_is_laid_out_like_its_parameter(optim):
    mesh, net = make_mesh(MESH), Net(SPEC)
    axes, params = net.axes(), net.abstract()
    tx, _ = make_optimizer(TrainingConfig(optim=optim, weight_decay=0.1), 10, axes=axes)
    wanted = place.params_shardings(net, params, mesh)
    got = place.optimizer_shardings(tx, params, wanted)
    shapes = jax.eval_shape(tx.init, params)
    specs = {
        jax.tree_util.keystr(path): (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(wanted), strict=True
        )
    }
    matched = 0
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_flatten_with_path(shapes)[0], jax.tree.leaves(got), strict=True
    ):
        owner = [s for name, s in specs.items() if jax.tree_util.keystr(path).endswith(name)]
        if owner and owner[0][0] == leaf.shape:
            assert sharding.spec == owner[0][1]
            matched += 1
        else:
            assert sharding.spec == P()
    moments = {"adamw": 2, "lion": 1, "sgd": 0}
    if optim in moments:
        assert matched == moments[optim] * len(specs)


def test_jit_honours_the_optimizer_shardings():
    mesh = make_mesh("data=2,fsdp=4")
    sharding = {"kernel": NamedSharding(mesh, P("fsdp"))}
    params = {"kernel": jax.device_put(jnp.ones((8, 4)), sharding["kernel"])}
    tx = optax.adamw(1e-3)
    out = place.optimizer_shardings(tx, params, sharding)
    state = jax.jit(tx.init, out_shardings=out)(params)
    assert state[0].mu["kernel"].sharding == params["kernel"].sharding
    assert state[0].nu["kernel"].sharding == params["kernel"].sharding


def test_rows_go_to_their_shard_and_scalars_everywhere():
    mesh = make_mesh(MESH)
    batch = {"ids": np.arange(24, dtype=np.int32).reshape(8, 3), "beta": np.float32(0.5)}
    out = place.put_batch(mesh, batch)
    assert out["ids"].sharding.spec == P(("data", "fsdp"))
    assert out["ids"].addressable_shards[0].data.shape == (2, 3)
    assert out["beta"].sharding.is_fully_replicated
    for name, value in batch.items():
        np.testing.assert_array_equal(out[name], value)
        assert out[name].dtype == value.dtype


def test_rows_that_do_not_divide_are_refused_by_name():
    with pytest.raises(MeshError, match=r"'ids'.* 6 rows .*data=2 × fsdp=2 = 4"):
        place.put_batch(make_mesh(MESH), {"ids": np.zeros((6, 3), np.int32)})


def test_one_device_holds_whole_batches():
    mesh = make_mesh(None, devices=jax.devices()[:1])
    out = place.put_batch(mesh, {"ids": np.zeros((5, 3), np.int32)})
    assert out["ids"].shape == (5, 3)
