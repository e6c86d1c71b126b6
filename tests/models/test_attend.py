"""One function for attention: which kernel it takes, and that all of them compute the same."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.errors import ConfigError
from jrlhf.models import axes, flash
from jrlhf.models.attend import ALIASES, NO_WINDOW, How, attend, choose, choose_for, named
from jrlhf.models.attention import Scoring
from jrlhf.models.build import Net
from jrlhf.models.encoder_spec import EncoderSpec
from jrlhf.models.spec import ATTENTIONS, DecoderSpec
from jrlhf.sharding.mesh import make_mesh
from jrlhf.sharding.rules import activate

# ------------------------------------------------------------------ the choice

CHOICES = {
    # (asked, platform, what is special): path
    ("auto", "cpu", ()): "xla",
    ("auto", "rocm", ()): "xla",
    ("auto", "tpu", ()): "splash",
    ("auto", "tpu", ("softcap", "sinks", "float32")): "splash",
    ("auto", "tpu", ("cut",)): "xla",
    ("auto", "cuda", ()): "cudnn",
    ("auto", "cuda", ("float32",)): "xla",
    ("auto", "cuda", ("softcap",)): "xla",
    ("auto", "cuda", ("sinks",)): "xla",
    ("auto", "cuda", ("cut",)): "xla",
    ("auto", "cuda", ("wide",)): "xla",
    ("auto", "cuda", ("odd",)): "xla",
    ("xla", "tpu", ()): "xla",
    ("xla", "cuda", ("cut", "softcap")): "xla",
    ("cudnn", "cuda", ()): "cudnn",
    ("splash", "tpu", ("softcap",)): "splash",
    ("splash_interpret", "cpu", ("sinks",)): "splash_interpret",
}
REFUSED = {
    ("cudnn", "cpu", ()): "needs a CUDA GPU",
    ("cudnn", "tpu", ()): "needs a CUDA GPU",
    ("cudnn", "cuda", ("float32",)): "bfloat16 alone",
    ("cudnn", "cuda", ("softcap",)): "soft-cap",
    ("cudnn", "cuda", ("sinks",)): "sinks",
    ("cudnn", "cuda", ("wide",)): "have 256",
    ("cudnn", "cuda", ("cut",)): "sequence that the mesh cuts",
    ("splash", "cuda", ()): "needs a TPU",
    ("splash", "tpu", ("cut",)): "sequence that the mesh cuts",
}


def chosen(asked, platform, special):
    flags = {name: name in special for name in ("softcap", "sinks", "cut")}
    dtype = "float32" if "float32" in special else "bfloat16"
    head_dim = 256 if "wide" in special else 60 if "odd" in special else 128
    return choose(asked, platform=platform, dtype=dtype, head_dim=head_dim, **flags)


@pytest.mark.parametrize(("case", "path"), CHOICES.items(), ids=str)
def test_each_platform_takes_its_kernel_where_that_can(case, path):
    assert chosen(*case) == path


@pytest.mark.parametrize(("case", "says"), REFUSED.items(), ids=str)
def test_a_kernel_asked_for_by_name_that_cannot_is_an_error(case, says):
    with pytest.raises(ConfigError, match=says) as caught:
        chosen(*case)
    assert f"attn_implementation={case[0]!r}" in str(caught.value)
    assert "'auto'" in str(caught.value)


def test_users_may_write_transformers_names():
    assert named(None) == named("sdpa") == named("flash_attention_2") == "auto"
    assert named("eager") == "xla"
    assert all(named(name) == name for name in ATTENTIONS)
    assert set(ALIASES.values()) <= set(ATTENTIONS)
    with pytest.raises(ConfigError, match='Did you mean "flash_attention_2"'):
        named("flash_attn_2")


# ------------------------------------------------------------------ the kernels

H, E = 4, 16
LENGTH = 2 * flash.LANES + 3  # three blocks of keys, the last of them mostly padding
SHORT = 37
CASES = {
    # two key-value heads, of two or four query heads each
    "causal": {},
    "window": {"window": 130},
    "packed, soft-cap": {"segments": "packed", "softcap": 1.5, "scale": 0.9},
    "left-padded, sinks": {"segments": "left", "sinks": True},
    "one key-value head, all": {
        "kv": 1, "window": 9, "segments": "packed", "softcap": 2.0, "sinks": True, "scale": 0.7,
        "length": SHORT,
    },
    "no groups, right-padded": {"kv": 4, "segments": "right", "length": SHORT, "window": 20},
}  # fmt: skip


def segments_of(kind, length):
    if kind is None:
        return None
    rows = np.ones((2, length), np.int32)
    if kind == "packed":
        rows[0, length // 3 :] = 2
        rows[0, length // 2 :] = 3
        rows[1, -length // 4 :] = 0
    if kind == "left":
        rows[0, : length // 3] = 0
    if kind == "right":
        rows[1, length // 2 :] = 0
    return rows


def arrays(case, seed=0):
    length, kv = case.get("length", LENGTH), case.get("kv", 2)
    draw = np.random.default_rng(seed)
    q, g = (draw.normal(size=(2, length, H, E)).astype(np.float32) for _ in range(2))
    k, v = (draw.normal(size=(2, length, kv, E)).astype(np.float32) for _ in range(2))
    sinks = draw.normal(size=H).astype(np.float32) if case.get("sinks") else None
    return q, k, v, segments_of(case.get("segments"), length), sinks, g


def plain(q, k, v, segments, sinks, case):
    """Attention in float64 (or traced), written the plain way."""
    length = q.shape[1]
    groups = H // k.shape[2]
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    scores = jnp.einsum("bshe,bthe->bhst", q, k) * case.get("scale", E**-0.5)
    if "softcap" in case:
        scores = case["softcap"] * jnp.tanh(scores / case["softcap"])
    behind = np.arange(length)[:, None] - np.arange(length)
    allowed = (behind >= 0) & (behind < case.get("window", length))
    allowed = np.broadcast_to(allowed, (2, length, length))
    if segments is not None:
        allowed = allowed & (segments[:, :, None] == segments[:, None])
    weights = jnp.where(allowed[:, None], jnp.exp(scores), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks)[None, :, None, None]
    return jnp.einsum("bhst,bthe->bshe", weights / total, v)


def both(function, args, g):
    """The result and the gradients with respect to all arrays that are given."""
    which = tuple(i for i, x in enumerate(args) if x is not None)

    def objective(*args):
        out = function(*args)
        return jnp.sum(out * g), out

    gradients, out = jax.jit(jax.grad(objective, which, has_aux=True))(*args)
    return [out, *gradients]


def agree(got, wanted, *, forward, backward):
    for i, (one, other) in enumerate(zip(got, wanted, strict=True)):
        other = np.asarray(other, np.float64)
        bound = (backward if i else forward) * np.abs(other).max()
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=0, atol=bound)


def expected(args, g, segments, case):
    """What the plain formula gives in float64."""
    wide = [None if x is None else x.astype(np.float64) for x in args]

    def formula(q, k, v, sinks=None):
        return plain(q, k, v, segments, sinks, case)

    with jax.enable_x64(True):
        return [np.asarray(x) for x in both(formula, wide, g.astype(np.float64))]


def attended(path, case, *, dtype="float32", windows=None):
    """`attend` of a case's arrays through a path, as one function."""
    scoring = Scoring(case.get("scale"), case.get("softcap"))
    size = case.get("window", NO_WINDOW)
    how = How(path, dtype, scoring, windows or (size,))
    window = None if how.windows == (NO_WINDOW,) else jnp.int32(size)
    segments = arrays(case)[3]

    def run(q, k, v, sinks):
        return attend(q, k, v, segments, window, sinks, how=how)

    return run


@pytest.mark.parametrize("name", CASES)
def test_splash_equals_the_plain_formula_and_so_do_its_gradients(name):
    # `attention.attend_causal` has its own test against the same formula (test_attention.py).
    q, k, v, segments, sinks, g = arrays(CASES[name])
    got = both(attended("splash_interpret", CASES[name]), (q, k, v, sinks), g)
    wanted = expected((q, k, v, sinks), g, segments, CASES[name])
    agree(got, wanted, forward=2e-6, backward=5e-6)


def test_splash_in_bfloat16_keeps_its_statistics_in_float32():
    # Scores up to 100: their sums of exponents in bfloat16 would be off by a fourth and more.
    name = "left-padded, sinks"
    q, k, v, segments, sinks, g = arrays(CASES[name])
    # The scale is 2^-2 and these operands are exact in bfloat16: rounding starts after them.
    q, k, v, g = (x.astype(jnp.bfloat16).astype(np.float32) for x in (8 * q, k, v, g))
    got = both(attended("splash_interpret", CASES[name], dtype="bfloat16"), (q, k, v, sinks), g)
    assert [x.dtype for x in got] == [jnp.bfloat16, *[jnp.float32] * 4]
    wanted = expected((q, k, v, sinks), g, segments, CASES[name])
    # bfloat16 keeps 2^-9 of a number; weights and their gradients are rounded before each dot.
    agree(got, wanted, forward=2**-8, backward=2**-6)


@pytest.mark.parametrize("name", ["window", "one key-value head, all", "left-padded, sinks"])
def test_what_cudnn_is_asked_for_is_the_plain_formula(name):
    # cuDNN itself needs a GPU; the same call without it shows mask, window, scale and padding.
    case = {k: v for k, v in CASES[name].items() if k not in ("softcap", "sinks")}
    q, k, v, segments, _, g = arrays(case)
    scoring = Scoring(case.get("scale"), None)

    def ours(q, k, v):
        return flash.cudnn(
            q, k, v, segments, window=case.get("window"), dtype="float32", scoring=scoring,
            implementation="xla",
        )  # fmt: skip

    wanted = expected((q, k, v), g, segments, case)
    agree(both(ours, (q, k, v), g), wanted, forward=2e-6, backward=5e-6)


class Cuda:
    """One GPU, which the test does not have (`axes.Shards`)."""

    platform = "cuda"

    def cuts(self, axis, size):
        return 1

    def map(self, function, inputs):
        return function


@pytest.mark.parametrize("packed", [False, True])
def test_a_models_gradient_lowers_to_cudnns_calls(packed, monkeypatch):
    # Lowered for CUDA, not run. jax asks the installed cuDNN for its version; there is none here.
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91100)
    net = Net(SPEC.replace(attention_softcap=None, dtype="bfloat16", remat="none"))
    ids = jax.ShapeDtypeStruct((2, 13), jnp.int32)  # odd: cuDNN's gradient wants even lengths

    def loss(params, ids, segments):
        with axes.resolve_with(None, Cuda()):
            return jnp.sum(net.hidden(params, ids, segments=segments).astype(jnp.float32))

    traced = jax.jit(jax.grad(loss)).trace(net.abstract(), ids, ids if packed else None)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # One call for each of the model's three windows, forward and backward.
    kind = "ScaleBiasSoftmax" if packed else "Softmax"
    assert len(set(re.findall(rf"@__cudnn\$fmha{kind}\(.*", text))) == 3
    assert len(set(re.findall(rf"@__cudnn\$fmha{kind}Backward\(.*", text))) == 3


@pytest.mark.parametrize("size", [9, 20, NO_WINDOW])
def test_each_layer_gets_the_kernel_of_its_own_window(size):
    case = {"length": SHORT, "window": size}
    q, k, v, _, sinks, _ = arrays(case)
    out = jax.jit(attended("splash_interpret", case, windows=(9, 20, NO_WINDOW)))(q, k, v, sinks)
    wanted = jax.jit(attended("xla", case, windows=(9, 20, NO_WINDOW)))(q, k, v, sinks)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    how = How("splash_interpret", "float32", Scoring(), (9, 20, NO_WINDOW))
    alone = jax.make_jaxpr(lambda q: attend(q, k, v, None, np.int32(size), None, how=how))(q)
    # Its window is known: no other kernel is in its program.
    assert str(alone).count("pallas_call[") == 1


@pytest.mark.parametrize(("kv", "shape"), [(2, "data=2,tensor=4"), (4, "fsdp=2,tensor=2,data=2")])
def test_a_mesh_cuts_rows_and_heads_of_a_kernel(kv, shape):
    # With two key-value heads over four parts, each part gets a copy of the one that it reads.
    case = {"length": SHORT, "segments": "packed", "sinks": True, "kv": kv}
    q, k, v, segments, sinks, g = arrays(case)
    q, k, v, g = (np.concatenate((x, -x)) for x in (q, k, v, g))
    segments = np.concatenate((segments, segments))
    how = How("splash_interpret", "float32", Scoring())

    def run(mesh):
        def function(q, k, v, sinks):
            with activate(mesh):
                return attend(q, k, v, segments, None, sinks, how=how)

        return both(function, (q, k, v, sinks), g)

    agree(run(make_mesh(shape)), run(None), forward=1e-6, backward=2e-6)


def test_a_mesh_that_cuts_the_sequence_takes_the_compilers_own():
    how = How("splash_interpret", "float32", Scoring())
    x = jnp.zeros((4, 16, 4, 8))

    def trace(how):
        with activate(make_mesh("data=2,sequence=4")):
            return jax.make_jaxpr(lambda x: attend(x, x, x, None, None, None, how=how))(x)

    with pytest.raises(ConfigError, match="sequence that the mesh cuts"):
        trace(how)
    assert "pallas_call" not in str(trace(how._replace(asked="auto")))


# ------------------------------------------------------------------ whole models

SPEC = DecoderSpec(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, windows=(0, 5, 3),
    attention_softcap=3.0, initializer_range=0.3, remat="attention",
)  # fmt: skip


def test_a_model_trains_alike_on_every_path():
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 31, (2, 14)).astype(np.int32)
    segments = np.ones((2, 14), np.int32)
    segments[0, :4] = 0  # padded on the left
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    g = draw.normal(size=(2, 14, 16)).astype(np.float32) * segments[..., None]
    params = jax.jit(Net(SPEC).init)(jax.random.key(0))

    def run(attention):
        net = Net(SPEC.replace(attention=attention))

        def objective(params):
            hidden = net.hidden(params, ids, segments=segments, positions=positions)
            return jnp.sum(hidden * g), hidden * segments[..., None]

        gradients, hidden = jax.jit(jax.grad(objective, has_aux=True))(params)
        return [hidden, *jax.tree.leaves(gradients)]

    assert "pallas_call" in str(
        jax.make_jaxpr(lambda p: Net(SPEC.replace(attention="splash_interpret")).hidden(p, ids))(
            params
        )
    )
    agree(run("splash_interpret"), run("xla"), forward=2e-6, backward=1e-5)


def test_a_spec_says_before_anything_is_built_what_its_kernel_lacks():
    assert choose_for(SPEC, "auto") == SPEC
    assert choose_for(SPEC, "xla").attention == "xla"
    with pytest.raises(ConfigError, match="soft-cap"):
        choose_for(SPEC.replace(dtype="bfloat16"), "cudnn", "cuda")
    with pytest.raises(ConfigError, match="needs a TPU, and this program is for cpu"):
        choose_for(SPEC, "splash")
    encoder = EncoderSpec(
        model_type="bert", vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, head_dim=8, embedding_size=8,
    )  # fmt: skip
    assert choose_for(encoder, "xla") == encoder
    with pytest.raises(ConfigError, match="is for decoders; bert reads"):
        choose_for(encoder, "splash", "tpu")
