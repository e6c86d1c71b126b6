"""Properties of the forward pass that hold whatever the weights are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.models import build
from jrlhf.models.build import Net, combine, partition
from jrlhf.models.rope import inverse_frequencies
from jrlhf.models.spec import REMAT_POLICIES, DecoderSpec, RopeSpec
from jrlhf.ops.turned import Turned

SPEC = DecoderSpec(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    attention_bias=True,
    initializer_range=0.3,
    value_head=True,
)
NET = Net(SPEC)
LENGTHS = np.array([9, 5, 1], np.int32)
WIDTH = 9


def perturbed(net, seed=0):
    """Weights with norms and biases off their starting values."""
    params = jax.jit(net.init)(jax.random.key(seed))
    noise = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32), params)


@pytest.fixture(scope="module")
def params():
    return perturbed(NET)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(0, SPEC.vocab_size, (3, WIDTH)).astype(np.int32)


@pytest.fixture(scope="module")
def expected(params, ids):
    """Each row run alone, without any padding."""
    run = jax.jit(NET.hidden)
    return [run(params, row[None, :n])[0] for row, n in zip(ids, LENGTHS, strict=True)]


def close(ours, theirs, tolerance=2e-6):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def real(width, lengths=LENGTHS):
    return np.arange(width) < lengths[:, None]


def by_segment(rows):
    """Batch of (ids, segments, positions) from lists of documents per row; None is padding."""
    width = max(sum(len(doc) for doc in row) for row in rows)
    ids, segments, positions = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    for r, row in enumerate(rows):
        at = 0
        for number, doc in enumerate(row, start=1):
            span = slice(at, at + len(doc))
            ids[r, span], segments[r, span], positions[r, span] = doc, number, np.arange(len(doc))
            at += len(doc)
    return ids, segments, positions


@pytest.mark.parametrize("extra", [0, 7])
@pytest.mark.parametrize("filler", [0, 60])
def test_padding_on_the_right_never_matters(params, ids, expected, extra, filler):
    width = WIDTH + extra
    padded = np.where(real(width), np.pad(ids, ((0, 0), (0, extra))), filler)
    hidden = jax.jit(NET.hidden)(params, padded, lengths=LENGTHS)
    assert np.isfinite(hidden).all()
    for row, n, alone in zip(hidden, LENGTHS, expected, strict=True):
        close(row[:n], alone)


@pytest.mark.parametrize("filler", [0, 60])
def test_padding_on_the_left_never_matters(params, ids, expected, filler):
    width = WIDTH + 4
    left = np.full((3, width), filler, np.int32)
    segments, positions = np.zeros_like(left), np.zeros_like(left)
    for r, n in enumerate(LENGTHS):
        left[r, width - n :], segments[r, width - n :] = ids[r, :n], 1
        positions[r, width - n :] = np.arange(n)
    hidden = jax.jit(NET.hidden)(params, left, segments=segments, positions=positions)
    assert np.isfinite(hidden).all()
    for row, n, alone in zip(hidden, LENGTHS, expected, strict=True):
        close(row[width - n :], alone)


def test_packed_documents_equal_separate_rows(params, ids, expected):
    docs = [row[:n] for row, n in zip(ids, LENGTHS, strict=True)]
    packed, segments, positions = by_segment([docs])
    hidden = jax.jit(NET.hidden)(params, packed, segments=segments, positions=positions)[0]
    close(hidden, np.concatenate(expected))


def test_later_tokens_never_change_earlier_states(params, ids):
    run = jax.jit(NET.hidden)
    changed = ids.copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % SPEC.vocab_size
    before, after = run(params, ids), run(params, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before[:, 5:] - after[:, 5:]).max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize(("trunk", "turned"), [(0, False), (2, True)])
def test_prefill_and_decode_equal_the_full_forward(ids, trunk, turned, monkeypatch):
    monkeypatch.setattr(build, "platform", lambda: "cpu" if turned else "tpu")
    # Smaller weights: with those of SPEC, half a unit in the last place of each moves the states by
    # more than `close` allows, and the two layouts round their sums in different orders.
    net = Net(SPEC.replace(trunk_layers=trunk, initializer_range=0.15))
    params = perturbed(net)
    full = jax.jit(net.hidden)(params, ids)
    width, cut = 6, np.array([4, 3, 1], np.int32)  # right-padded prompts; the rest is decoded
    prompts = np.where(real(width, cut), ids[:, :width], 60)

    @jax.jit
    def run(params):
        params = net.unstack(params)
        hidden, cache = net.prefill(params, prompts, cut, cache_size=width + 5)
        rows, states = np.arange(3), []
        for j in range(5):
            slots = jnp.arange(width + 5)
            valid = (slots < cut[:, None]) | ((slots >= width) & (slots <= width + j))
            state, cache = net.decode(
                params, ids[rows, cut + j], cut + j, cache, slot=width + j, valid=valid
            )
            states.append(state)
        return hidden, jnp.stack(states, axis=1)

    hidden, states = run(params)
    for r, n in enumerate(cut):
        close(hidden[r, :n], full[r, :n])
        close(states[r], full[r, n : n + 5])


def test_a_scanned_stack_equals_its_layers_one_by_one(params, ids, monkeypatch):
    monkeypatch.setattr(build, "platform", lambda: "tpu")  # the same dots on both sides
    unstacked = NET.unstack(params)
    assert isinstance(unstacked["layers"], list)
    close(jax.jit(NET.hidden)(unstacked, ids), jax.jit(NET.hidden)(params, ids))


def split(params, trunk):
    """The same weights, the lower layers as a trunk."""
    layers = params["layers"]
    cut = {**params, "trunk": jax.tree.map(lambda x: x[:trunk], layers)}
    cut["layers"] = jax.tree.map(lambda x: x[trunk:], layers)
    if trunk == SPEC.num_hidden_layers:
        del cut["layers"]
    return cut


def objective(net):
    def loss(trainable, frozen, ids):
        hidden = net.hidden(combine(trainable, frozen), ids)
        weights = np.random.default_rng(2).normal(size=hidden.shape).astype(np.float32)
        params = combine(trainable, frozen)
        return jnp.sum(hidden * weights) + jnp.sum(net.values(params, hidden))

    return jax.value_and_grad(loss)


@pytest.mark.parametrize("trunk", [1, 3])
def test_a_frozen_trunk_changes_neither_the_states_nor_the_upper_gradients(params, ids, trunk):
    whole, upper = partition(params, NET)
    assert upper == {}
    value, gradient = jax.jit(objective(NET))(whole, {}, ids)

    net = Net(SPEC.replace(trunk_layers=trunk))
    trainable, frozen = partition(split(params, trunk), net)
    assert set(frozen) == {"trunk", "embed"}
    assert jax.tree.structure(combine(trainable, frozen)) == jax.tree.structure(net.abstract())
    frozen_value, frozen_gradient = jax.jit(objective(net))(trainable, frozen, ids)
    close(frozen_value, value)
    expected = {key: leaf for key, leaf in split(gradient, trunk).items() if key in trainable}
    jax.tree.map(close, frozen_gradient, expected)


def test_the_trunk_costs_no_backward_pass(ids):
    """Without gradient below it, a fully frozen model must cost about one forward pass."""
    net = Net(SPEC.replace(trunk_layers=SPEC.num_hidden_layers))
    trainable, frozen = partition(net.abstract(), net)

    def flops(f, *args):
        return jax.jit(f).lower(*args).cost_analysis()["flops"]

    forward = flops(lambda t, f, i: net.hidden(combine(t, f), i), trainable, frozen, ids)
    both = flops(objective(net), trainable, frozen, ids)
    assert both < 1.2 * forward


@pytest.mark.parametrize("remat", sorted(set(REMAT_POLICIES) - {"none"}))
def test_remat_policies_change_no_gradient_and_save_memory(params, ids, remat):
    def compiled(net):
        lowered = jax.jit(objective(net)).lower(params, {}, np.tile(ids, (4, 8)))
        return lowered.compile()

    plain, remade = compiled(NET), compiled(Net(SPEC.replace(remat=remat)))
    batch = np.tile(ids, (4, 8))
    # Recomputed layers are fused otherwise, so they round otherwise: the bound is contract 1's.
    pairs = (remade(params, {}, batch), plain(params, {}, batch))
    jax.tree.map(lambda a, b: close(a, b, tolerance=1e-5), *pairs)
    sizes = [c.memory_analysis().temp_size_in_bytes for c in (remade, plain)]
    if remat != "dots":  # which keeps the matmuls' results: about all there is in a model so small
        assert sizes[0] < sizes[1]


def test_layer_norm_models_run_and_centre(ids):
    net = Net(SPEC.replace(norm="layer"))
    params = jax.jit(net.init)(jax.random.key(3))
    hidden = np.asarray(jax.jit(net.hidden)(params, ids))
    # At init scale 1 and bias 0: mean 0 and variance 1 (up to eps) in every position.
    np.testing.assert_allclose(hidden.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(hidden.var(-1), 1, atol=1e-4)


def test_bfloat16_compute_stays_near_float32_and_keeps_float32_gradients(params, ids):
    net = Net(SPEC.replace(dtype="bfloat16"))
    exact = jax.jit(NET.hidden)(params, ids)
    rounded = jax.jit(net.hidden)(params, ids)
    assert rounded.dtype == jnp.bfloat16
    assert net.head(params).dtype == jnp.bfloat16
    close(np.asarray(rounded, np.float32), exact, tolerance=0.05)
    _, gradient = jax.jit(objective(net))(params, {}, ids)
    _, reference = jax.jit(objective(NET))(params, {}, ids)
    for leaf, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True):
        assert leaf.dtype == jnp.float32
        if not np.any(other):  # the head: this objective does not read it
            continue
        cosine = np.vdot(leaf, other) / np.linalg.norm(leaf) / np.linalg.norm(other)
        assert cosine > 0.99


def test_bfloat16_dots_have_bfloat16_operands_and_float32_results_forwards_and_backwards(ids):
    net = Net(SPEC.replace(dtype="bfloat16", value_head=False))
    loss = lambda params: jnp.sum(net.hidden(params, ids).astype(jnp.float32))  # noqa: E731
    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(net.abstract()))
    dots = [line for line in jaxpr.splitlines() if " dot_general[" in line]
    assert len(dots) >= 3 * 7  # forward, and two backward, of the seven weights of a layer
    assert all(":f32[" in line for line in dots)
    assert "f32[" not in "".join(part for line in dots for part in line.split("dot_general[")[1:])


def test_unstacked_weights_are_cast_once_and_norms_stay(params):
    unstacked = jax.jit(Net(SPEC.replace(dtype="bfloat16")).unstack)(params)
    layer = unstacked["layers"][0]
    assert layer["attn"]["q"]["kernel"].dtype == layer["mlp"]["down"]["kernel"].dtype == "bfloat16"
    if jax.default_backend() == "cpu":
        assert isinstance(layer["attn"]["o"]["kernel"], Turned)
        assert layer["attn"]["o"]["kernel"].inputs == 2
    assert unstacked["head"]["kernel"].dtype == unstacked["embed"]["table"].dtype == "bfloat16"
    assert layer["attn_norm"]["scale"].dtype == unstacked["norm"]["scale"].dtype == "float32"
    assert unstacked["value"]["kernel"].dtype == "float32"


def test_llama3_frequencies_keep_short_waves_and_divide_long_ones():
    rope = RopeSpec(rope_type="llama3", rope_theta=5e5, factor=8.0)
    plain = inverse_frequencies(RopeSpec(rope_theta=5e5), 64)
    scaled = inverse_frequencies(rope, 64)
    wavelength = 2 * np.pi / plain
    short = wavelength < rope.original_max_position_embeddings / rope.high_freq_factor
    long = wavelength > rope.original_max_position_embeddings / rope.low_freq_factor
    assert short.any()
    assert long.any()
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-12)
    assert (np.diff(scaled) < 0).all()


def test_positions_act_only_by_their_differences(params, ids):
    """RoPE is relative: shifting all positions of a row changes nothing but rounding."""
    run = jax.jit(NET.hidden)
    shift = np.arange(WIDTH, dtype=np.int32)[None] + np.array([[0], [11], [40]], np.int32)
    close(run(params, ids, positions=shift), run(params, ids), tolerance=1e-5)
    stretched = shift * 2
    assert np.abs(run(params, ids, positions=stretched) - run(params, ids)).max() > 1e-2
