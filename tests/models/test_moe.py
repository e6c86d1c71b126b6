"""Routed experts: against a loop in float64, against transformers, and cut over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.models.build import Net
from jrlhf.models.families import spec_from_config
from jrlhf.models.layers import Keys
from jrlhf.models.load import load_pretrained
from jrlhf.models.moe import Moe, Routing, balancing_loss
from jrlhf.models.spec import DecoderSpec, MoeSpec
from jrlhf.sharding.mesh import make_mesh
from jrlhf.sharding.place import params_shardings
from jrlhf.sharding.rules import activate

D, F, X = 6, 8, 5
CONFIG = {
    "model_type": "mixtral", "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.3,
}  # fmt: skip
QWEN = {
    "model_type": "qwen3_moe", "num_experts": 4, "head_dim": 8, "moe_intermediate_size": 24,
    "num_hidden_layers": 3, "intermediate_size": 20,
}  # fmt: skip
PLAIN = {"mlp_only_layers": [1]}
MOES = {
    "normed": {},
    "raw, one expert each": {"normalize": False, "experts_per_token": 1},
    "biases, clamped": {"router_bias": True, "expert_bias": True, "clamp": 0.4, "alpha": 1.3},
}


def layer(moe):
    spec = DecoderSpec(
        vocab_size=7, hidden_size=D, intermediate_size=F, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=D, initializer_range=0.6, moe=moe,
    )  # fmt: skip
    block = Moe(spec, Keys(jax.random.key(0)))
    if moe.router_bias:
        block.router.bias[...] = jnp.linspace(-0.3, 0.3, X)
    if moe.expert_bias:
        for seed, each in enumerate((block.gate, block.up, block.down)):
            noise = np.random.default_rng(seed).normal(size=each.bias[...].shape)
            each.bias[...] = jnp.asarray(0.3 * noise, jnp.float32)
    return block


def kernels(each):
    bias = each.bias[...] if each.has_bias else np.zeros((X, 1))
    return np.asarray(each.kernel[...], np.float64), np.asarray(bias, np.float64)


def loop(block, x):
    """Token by token, expert by expert."""
    moe, out, visits = block.moe, np.zeros_like(x), np.zeros(X)
    router = np.asarray(block.router.kernel[...], np.float64)
    shift = np.asarray(block.router.bias[...]) if moe.router_bias else 0.0
    (gate, gate_b), (up, up_b), (down, down_b) = map(kernels, (block.gate, block.up, block.down))
    for t, token in enumerate(x):
        logits = token @ router + shift
        p = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-p)[: moe.experts_per_token]
        for e in best:
            g, u = token @ gate[e] + gate_b[e], token @ up[e] + up_b[e]
            if moe.clamp is None:
                h = g / (1 + np.exp(-g)) * u
            else:
                g, u = np.minimum(g, moe.clamp), np.clip(u, -moe.clamp, moe.clamp)
                h = g / (1 + np.exp(-moe.alpha * g)) * (u + 1)
            weight = p[e] / (p[best].sum() if moe.normalize else 1.0)
            out[t] += weight * (h @ down[e] + down_b[e])
            visits[e] += 1
    return out, visits


@pytest.mark.parametrize("flags", MOES.values(), ids=MOES.keys())
def test_every_token_visits_its_experts_and_none_is_dropped(flags):
    block = layer(MoeSpec(**{"num_experts": X, "experts_per_token": 2, **flags}))
    # Three tokens all alike: some experts get many at once, some none.
    x = np.random.default_rng(0).normal(size=(9, D))
    x[3:6] = x[2]
    expected, visits = loop(block, x)
    real = np.arange(12).reshape(2, 6) < 9
    padded = np.concatenate((x, np.full((3, D), 5.0))).reshape(2, 6, D).astype(np.float32)
    out, routing = jax.jit(lambda x: block(x, real))(padded)
    np.testing.assert_allclose(out.reshape(-1, D)[:9], expected, atol=2e-6 * abs(expected).max())
    np.testing.assert_array_equal(routing.counts, visits)
    assert float(routing.weight) == 9
    assert float(routing.probs.sum()) == pytest.approx(9, rel=1e-6)


def test_even_routing_has_the_smallest_balancing_loss():
    even = Routing(jnp.full(X, 2.0), jnp.full(X, 1.0), jnp.float32(5))
    assert float(balancing_loss(even)) == pytest.approx(2.0)  # experts per token
    skewed = Routing(jnp.array([10.0, 0, 0, 0, 0]), jnp.array([5.0, 0, 0, 0, 0]), jnp.float32(5))
    assert float(balancing_loss(skewed)) == pytest.approx(2.0 * X)
    # Sums merge: two halves together are the whole.
    whole = jax.tree.map(jnp.add, even, skewed)
    assert float(balancing_loss(whole)) != pytest.approx(
        float(balancing_loss(even) + balancing_loss(skewed)) / 2
    )
    nothing = Routing(jnp.zeros(X), jnp.zeros(X), jnp.float32(0))
    assert float(balancing_loss(nothing)) == 0


@pytest.mark.parametrize("changes", [{}, QWEN | PLAIN], ids=["all layers", "one layer has none"])
def test_experts_cut_over_devices_give_the_same_states_and_gradients(changes):
    net = Net(spec_from_config(CONFIG | changes))
    params = jax.jit(net.init)(jax.random.key(0))
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 31, (4, 6)).astype(np.int32)
    g = draw.normal(size=(4, 6, 16)).astype(np.float32)

    def run(mesh):
        def objective(params):
            with activate(mesh):
                hidden, routing = net.hidden_and_routing(params, ids)
                return jnp.sum(hidden * g) + balancing_loss(routing)

        placed = (
            params if mesh is None else jax.device_put(params, params_shardings(net, params, mesh))
        )
        return placed, jax.jit(jax.value_and_grad(objective))(placed)

    placed, many = run(make_mesh("data=2,expert=4"))
    kernel = placed["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[1] == 1  # one expert per device
    _, one = run(None)
    net = net.of(net.spec.replace(remat="full", trunk_layers=0))
    _, again = run(make_mesh("data=2,expert=2,tensor=2"))
    for got, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    for got, wanted in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "changes"),
    [("mixtral", {}), ("gpt_oss", {}), ("qwen3_moe", QWEN), ("qwen3_moe", QWEN | PLAIN)],
    ids=["mixtral", "gpt_oss", "qwen3_moe", "a plain MLP between experts"],
)
def test_the_balancing_loss_and_its_gradient_equal_transformers(family, changes, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    rest = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    values = {k: v for k, v in (CONFIG | changes).items() if k != "model_type"} | rest
    config = transformers.AutoConfig.for_model(family, **values)
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    model.double()
    lengths = np.array([7, 4], np.int32)
    ids = np.random.default_rng(0).integers(0, 31, (2, 7)).astype(np.int32)
    mask = torch.tensor(np.arange(7) < lengths[:, None]).long()
    out = model(torch.tensor(ids).long(), attention_mask=mask, output_router_logits=True)
    out.aux_loss.backward()
    weight = model.model.layers[0].mlp
    weight = (weight.router if family == "gpt_oss" else weight.gate).weight.grad.numpy().T

    net, params, _ = load_pretrained(tmp_path / "model")

    def objective(params):
        return balancing_loss(net.hidden_and_routing(params, ids, lengths=lengths)[1])

    loss, gradients = jax.jit(jax.value_and_grad(objective))(params)
    assert float(loss) == pytest.approx(out.aux_loss.item(), abs=2e-6)
    ours = gradients["layers"]["mlp"]["router"]["kernel"][0]
    np.testing.assert_allclose(ours, weight, rtol=0, atol=1e-5 * np.abs(weight).max())


def test_plain_mlps_between_experts_in_a_trunk_and_in_single_layers():
    """However layers are held: frozen ones apart, or each alone, as in decoding."""
    spec = spec_from_config(CONFIG | QWEN | PLAIN | {"num_hidden_layers": 4})
    net, ids = Net(spec), np.arange(14).reshape(2, 7).astype(np.int32)
    params = jax.jit(net.init)(jax.random.key(0))
    whole = np.asarray(net.hidden(params, ids))
    layers = params["layers"]
    for frozen in (1, 2, 3):
        cut = net.of(spec.replace(trunk_layers=frozen))
        split = {
            "trunk": jax.tree.map(lambda leaf: leaf[:frozen], layers),  # noqa: B023
            "layers": jax.tree.map(lambda leaf: leaf[frozen:], layers),  # noqa: B023
        }
        np.testing.assert_allclose(cut.hidden({**params, **split}, ids), whole, atol=2e-6)
    alone, _ = net.prefill(net.unstack(params), ids, np.array([7, 7]), cache_size=7)
    np.testing.assert_allclose(alone, whole, atol=2e-6)
    # A layer with a plain MLP: its experts' weights act on nothing, the other layers' do.
    for layer, same in ((1, True), (2, False)):
        wiped = jax.tree.map(lambda leaf: leaf.at[layer].set(0), layers["mlp"])  # noqa: B023
        changed = net.hidden({**params, "layers": {**layers, "mlp": wiped}}, ids)
        assert np.array_equal(changed, whole) is same
