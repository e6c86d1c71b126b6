"""The router's load-balancing loss in training: of the whole batch, however it is cut."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrlhf.algos import DPO, SFT
from jrlhf.errors import ConfigError
from jrlhf.models.build import Net, partition
from jrlhf.models.encoder_spec import EncoderSpec
from jrlhf.models.families import config_from_spec, spec_from_config
from jrlhf.models.load import load_pretrained
from jrlhf.models.moe import balancing_coefficient
from jrlhf.rollout.score import Actor
from jrlhf.sharding.mesh import make_mesh
from jrlhf.sharding.place import params_shardings, put_batch
from jrlhf.train.state import new_state, state_shardings
from jrlhf.train.step import make_evaluation, make_step

VOCAB, LAYERS, EXPERTS, VISITS, COEF = 31, 2, 4, 2, 0.7
CONFIG = {
    "model_type": "mixtral", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_local_experts": EXPERTS, "num_experts_per_tok": VISITS, "initializer_range": 0.3,
}  # fmt: skip
NET = Net(spec_from_config(CONFIG))


@pytest.fixture(scope="module")
def params():
    return jax.jit(NET.init)(jax.random.key(0))


def batch(rows=8, length=9):
    """Rows of very different lengths, so that a product of means is far from a mean of products."""
    draw = np.random.default_rng(0)
    lengths = np.array([9, 2, 3, 8, 2, 7, 4, 3], np.int32)[:rows]
    ids = draw.integers(0, VOCAB, (rows, length)).astype(np.int32)
    real = np.arange(length) < lengths[:, None]
    mask = (real & (np.arange(length) > 0)).astype(np.float32)
    return {"ids": ids, "lengths": lengths, "mask": mask}


def recorder():
    """An optimizer that keeps the gradient and moves nothing."""

    def update(gradient, state, params=None):
        return jax.tree.map(jnp.zeros_like, gradient), gradient

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def descend(params, given, *, algorithm=None, balance=COEF, accumulate=1, mesh=None, net=NET):
    """The gradient of a step, and its metrics."""
    trainable, frozen = partition(params, net)
    shardings, tx = None, recorder()
    if mesh is not None:
        placed = params_shardings(net, trainable, mesh)
        shardings = state_shardings(tx, trainable, placed)
        trainable = jax.device_put(trainable, placed)
    state = new_state(trainable, tx, shardings=shardings)
    actor = Actor(net)

    def loss(trainable, frozen, batch):
        return actor.loss(algorithm or SFT(), trainable, frozen, batch, balance=balance)

    step = make_step(loss, tx, accumulate=accumulate, mesh=mesh, shardings=shardings)
    placed = put_batch(mesh, given) if mesh is not None else jax.tree.map(jnp.asarray, given)
    new, metrics = step(state, frozen, placed)
    return jax.device_get(new.opt_state), {k: float(v) for k, v in metrics.items()}


def assert_close(got, wanted, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.fixture(scope="module")
def whole(params):
    return descend(params, batch())


@pytest.mark.parametrize(
    ("accumulate", "mesh"), [(4, None), (2, "data=2,expert=4"), (1, "data=2,fsdp=2,tensor=2")]
)
def test_neither_micro_batches_nor_devices_change_the_update(params, whole, accumulate, mesh):
    given = None if mesh is None else make_mesh(mesh)
    gradient, metrics = descend(params, batch(), accumulate=accumulate, mesh=given)
    assert_close(gradient, whole[0])
    for name in ("loss", "aux_loss", "mean_token_accuracy"):
        assert metrics[name] == pytest.approx(whole[1][name], rel=2e-6), name


def test_it_is_added_to_the_loss_with_its_weight_and_logged_without(params, whole):
    alone, plain = descend(params, batch(), balance=0.0)
    assert "aux_loss" not in plain
    assert whole[1]["loss"] == pytest.approx(plain["loss"] + COEF * whole[1]["aux_loss"], rel=1e-6)
    router = whole[0]["layers"]["mlp"]["router"]["kernel"]
    assert np.abs(router - alone["layers"]["mlp"]["router"]["kernel"]).max() > 1e-3
    # What comes after the last router does not feel it.
    np.testing.assert_allclose(whole[0]["head"]["kernel"], alone["head"]["kernel"], rtol=1e-6)


def router_oracle(params, given):
    """The load-balancing loss in float64 numpy, from the layers' inputs up: loops over tokens."""
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    counts, probs, pairs = np.zeros(EXPERTS), np.zeros(EXPERTS), 0

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

    for row, length in zip(given["ids"], given["lengths"], strict=True):
        x = wide["embed"]["table"][row[:length]]
        for i in range(LAYERS):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], wide["layers"])
            x = x + attention(norm(x, layer["attn_norm"]["scale"]), layer["attn"])
            h = norm(x, layer["mlp_norm"]["scale"])
            y = np.zeros_like(x)
            for t, token in enumerate(h):
                logits = token @ layer["mlp"]["router"]["kernel"]
                p = np.exp(logits - logits.max())
                p /= p.sum()
                best = np.argsort(-p)[:VISITS]
                counts[best] += 1
                probs += p
                pairs += 1
                for e in best:
                    gate, up = (token @ layer["mlp"][name]["kernel"][e] for name in ("gate", "up"))
                    out = (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down"]["kernel"][e]
                    y[t] += p[e] / p[best].sum() * out
            x = x + y
    return EXPERTS * np.sum(counts / pairs * probs / pairs)


def attention(x, layer):
    q, k, v = (np.einsum("sd,dhe->she", x, layer[name]["kernel"]) for name in "qkv")
    s, _, e = q.shape
    angles = np.arange(s)[:, None] / 1e6 ** (np.arange(0, e, 2) / e)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def turn(z):
        a, b = z[..., : e // 2], z[..., e // 2 :]
        return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)

    scores = np.einsum("she,the->hst", turn(q), turn(k)) / np.sqrt(e)
    scores = np.where(np.tri(s, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hst,the,hed->sd", weights, v, layer["o"]["kernel"])


def test_it_is_what_a_loop_in_float64_says(params, whole):
    assert whole[1]["aux_loss"] == pytest.approx(router_oracle(params, batch()), rel=2e-6)


def test_padding_and_packing_never_matter(params, whole):
    given = batch()
    wider = {k: np.pad(v, [(0, 0), (0, 3)], constant_values=7) if v.ndim == 2 else v
             for k, v in given.items()}  # fmt: skip
    wider["mask"][:, 9:] = 0
    packed = {k: np.zeros((4, 14), v.dtype) for k, v in given.items() if k != "lengths"}
    packed |= {name: np.zeros((4, 14), np.int32) for name in ("segments", "positions")}
    for row, members in enumerate([(0, 1), (2, 3), (4, 5), (6, 7)]):
        at = 0
        for number, member in enumerate(members):
            n = int(given["lengths"][member])
            for name in ("ids", "mask"):
                packed[name][row, at : at + n] = given[name][member, :n]
            packed["segments"][row, at : at + n] = number + 1
            packed["positions"][row, at : at + n] = np.arange(n)
            at += n
    packed["lengths"] = np.sum(packed["segments"] > 0, axis=1).astype(np.int32)
    for other in (wider, packed):
        gradient, metrics = descend(params, other)
        assert_close(gradient, whole[0])
        assert metrics["aux_loss"] == pytest.approx(whole[1]["aux_loss"], rel=2e-6)


def test_evaluation_takes_it_over_the_whole_set(params, whole):
    actor = Actor(NET)

    def loss(trainable, frozen, batch):
        return actor.loss(SFT(), trainable, frozen, batch, balance=COEF)

    given = jax.tree.map(jnp.asarray, batch())
    halves = [jax.tree.map(lambda x, i=i: x[i::2], given) for i in (0, 1)]
    values = make_evaluation(loss)(params, {}, halves)
    for name in ("loss", "aux_loss"):
        assert values[name] == pytest.approx(whole[1][name], rel=2e-6)


def test_frozen_layers_are_not_counted_whether_their_states_are_kept_or_not(params):
    net = Net(NET.spec.replace(trunk_layers=1))
    given = batch()
    below = jax.tree.map(lambda x: x[:1], params["layers"])
    above = jax.tree.map(lambda x: x[1:], params["layers"])
    cut = {**params, "trunk": below, "layers": above}

    def routing(trunk=None):
        return net.hidden_and_routing(cut, given["ids"], lengths=given["lengths"], trunk=trunk)[1]

    anew = routing()
    kept = routing(net.trunk(cut, given["ids"], lengths=given["lengths"]))
    assert float(anew.weight) == given["lengths"].sum()
    assert_close(kept, anew)


def test_the_coefficient_is_the_configs_else_the_models():
    spec = spec_from_config({**CONFIG, "router_aux_loss_coef": 0.02})
    assert balancing_coefficient(spec, None) == 0.02
    assert balancing_coefficient(spec, 0.5) == 0.5
    assert balancing_coefficient(spec, 0.0) == 0.0
    assert balancing_coefficient(spec.replace(trunk_layers=LAYERS), None) == 0.0
    assert config_from_spec(spec)["router_aux_loss_coef"] == 0.02
    dense = spec.replace(moe=None)
    assert balancing_coefficient(dense, None) == balancing_coefficient(dense, 0.0) == 0.0
    for asked, model in ((0.5, dense), (-1.0, spec)):
        with pytest.raises(ConfigError, match="router_aux_loss_coef"):
            balancing_coefficient(model, asked)
    encoder = EncoderSpec(
        model_type="bert", vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, head_dim=8, embedding_size=8,
    )  # fmt: skip
    assert balancing_coefficient(encoder, None) == 0.0


# ------------------------------------------------------------------ against transformers


@functools.cache
def theirs(family, folder):
    """transformers' model with random weights, in float64, saved for ours to read."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    values = {k: v for k, v in CONFIG.items() if k != "model_type"}
    values |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    values |= {"router_aux_loss_coef": COEF, "output_router_logits": True, "head_dim": 8}
    if family == "qwen3_moe":
        values |= {"moe_intermediate_size": 24, "num_experts": EXPERTS, "norm_topk_prob": True}
    config = transformers.AutoConfig.for_model(family, **values)
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model.double()


@pytest.mark.parity
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_loss_and_its_gradient_equal_transformers(family, tmp_path_factory):
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp(family)
    model = theirs(family, folder)
    given = batch()
    ids, mask = torch.tensor(given["ids"]).long(), torch.tensor(given["mask"])
    real = torch.arange(9)[None] < torch.tensor(given["lengths"])[:, None]
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=real.long(), labels=labels)
    out.loss.backward()

    net, params, _ = load_pretrained(folder)
    coefficient = balancing_coefficient(net.spec, None)
    assert coefficient == COEF
    gradient, metrics = descend(params, given, balance=coefficient, net=net)
    assert metrics["aux_loss"] == pytest.approx(out.aux_loss.item(), rel=2e-6)
    assert metrics["loss"] == pytest.approx(out.loss.item(), rel=2e-6)
    for layer, block in enumerate(model.model.layers):
        wanted = block.mlp.gate.weight.grad.numpy().T
        ours = gradient["layers"]["mlp"]["router"]["kernel"][layer]
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        wanted = block.self_attn.v_proj.weight.grad.numpy().T
        ours = gradient["layers"]["attn"]["v"]["kernel"][layer].reshape(wanted.shape)
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_pairs_are_balanced_over_both_members(params):
    given = batch()
    pairs = {k: v.reshape(4, 2, *v.shape[1:]) for k, v in given.items()}
    pairs["ref_logps"] = np.zeros((4, 2, 9), np.float32)
    _, metrics = descend(params, pairs, algorithm=DPO())
    assert metrics["aux_loss"] == pytest.approx(router_oracle(params, given), rel=2e-6)
