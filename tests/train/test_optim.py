"""Optimizers and schedules: transformers' and torch's numbers, or an error that names the word."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrlhf.config import TrainingConfig
from jrlhf.errors import ConfigError
from jrlhf.train.optim import OPTIMIZERS, SCHEDULES, decay_mask, make_optimizer, make_schedule

TOTAL = 23
CASES = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr": 2e-3, "num_cycles": 0.75}),
    ("polynomial", {"lr_end": 1e-4, "power": 2.0}),
    ("polynomial", {}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 4}),
]


def config(**values):
    return TrainingConfig(**{"learning_rate": 1e-2, **values})


def rates(cfg, steps=TOTAL):
    return np.asarray(make_schedule(cfg, steps)(np.arange(steps + 1)))


@pytest.mark.parity
@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_schedules_are_transformers_step_by_step(name, options, warmup):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    theirs = get_scheduler(name, optimizer, warmup, TOTAL, scheduler_specific_kwargs=dict(options))
    wanted = []
    for _ in range(TOTAL + 1):
        wanted.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    cfg = config(lr_scheduler_type=name, lr_scheduler_kwargs=options, warmup_steps=warmup)
    np.testing.assert_allclose(rates(cfg), wanted, rtol=2e-6, atol=2e-9)


def test_every_schedule_is_covered_by_the_parity_test():
    assert {name for name, _ in CASES} == set(SCHEDULES)


def test_linear_rises_from_zero_and_falls_to_zero():
    got = rates(config(warmup_steps=3))
    wanted = [1e-2 * (i / 3 if i < 3 else (TOTAL - i) / (TOTAL - 3)) for i in range(TOTAL + 1)]
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-12)


def test_warmup_ratio_is_rounded_up_and_warmup_steps_win():
    by_ratio = rates(config(warmup_ratio=0.1))
    np.testing.assert_array_equal(by_ratio, rates(config(warmup_steps=math.ceil(TOTAL * 0.1))))
    np.testing.assert_array_equal(by_ratio, rates(config(warmup_steps=0.1)))
    both = rates(config(warmup_ratio=0.9, warmup_steps=2))
    np.testing.assert_array_equal(both, rates(config(warmup_steps=2)))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"lr_scheduler_type": "cosin"}, 'Did you mean "cosine"'),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "known: linear"),
        ({"lr_scheduler_kwargs": {"min_lr": 1}}, "'linear' has no 'min_lr'; it takes none"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"powr": 1}},
            'Did you mean "power"',
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs one of"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1.0}},
            "must be less than",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 0.5}},
            "must be less than",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "two"}},
            "power must be a number from 0 up, got 'two'",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": [1]}},
            r"num_cycles must be a number from 0 up, got \[1\]",
        ),
        (
            {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": -5}},
            "timescale must be a number from 0 up, got -5",
        ),
        ({"optim": "adamww"}, 'Did you mean "adamw"'),
        ({"optim": "paged_adamw_8bit"}, "known: adamw, sgd"),
    ],
)
def test_unknown_words_are_named_with_a_suggestion(values, says):
    with pytest.raises(ConfigError, match=says):
        make_optimizer(config(**values), TOTAL)


def test_a_number_written_as_text_is_that_number():
    def ending(value):
        return config(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": value})

    np.testing.assert_array_equal(rates(ending("1e-5")), rates(ending(1e-5)))


PARAMS = {
    "embed": {"table": (6, 4)},
    "layers": {
        "attn_norm": {"scale": (2, 4)},
        "attn": {"q": {"kernel": (2, 4, 2, 2), "bias": (2, 2, 2)}, "o": {"kernel": (2, 2, 2, 4)}},
    },
    "norm": {"scale": (4,)},
    "value": {"kernel": (4, 1), "bias": (1,)},
}
AXES = {
    "embed": {"table": ("vocab", "embed")},
    "layers": {
        "attn_norm": {"scale": ("layers", None)},
        "attn": {
            "q": {
                "kernel": ("layers", "embed", "heads", None),
                "bias": ("layers", "heads", None),
            },
            "o": {"kernel": ("layers", "heads", None, "embed")},
        },
    },
    "norm": {"scale": (None,)},
    "value": {"kernel": ("embed", None), "bias": (None,)},
}


def drawn(seed):
    leaves, tree = jax.tree.flatten(PARAMS, is_leaf=lambda x: isinstance(x, tuple))
    draw = np.random.default_rng(seed).normal
    return jax.tree.unflatten(tree, [jnp.asarray(draw(size=s), jnp.float32) for s in leaves])


def names(tree):
    return {jax.tree_util.keystr(p, simple=True, separator="."): x
            for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}  # fmt: skip


def test_decay_spares_norms_biases_and_vectors_only():
    decayed = {name for name, value in names(decay_mask(drawn(0))).items() if value}
    assert decayed == {
        "embed.table",
        "layers.attn.q.kernel",
        "layers.attn.o.kernel",
        "value.kernel",
    }


@pytest.mark.parametrize("optim", sorted(OPTIMIZERS))
def test_with_zero_gradients_only_decayed_weights_shrink_by_rate_times_decay(optim):
    tx, _ = make_optimizer(
        config(optim=optim, weight_decay=0.3, lr_scheduler_type="constant"), TOTAL, axes=AXES
    )
    params = drawn(0)
    updates = first_update(tx, params, jax.tree.map(jnp.zeros_like, params))
    mask = names(decay_mask(params))
    for name, update in names(updates).items():
        # Muon hands what is not a hidden weight to adamw without decay.
        acts = mask[name] and (optim != "muon" or name.startswith("layers"))
        wanted = -1e-2 * 0.3 * names(params)[name] * acts
        np.testing.assert_allclose(update, wanted, rtol=1e-5, atol=1e-9, err_msg=name)


def trajectory(tx, params, steps=6):
    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, drawn(100 + i))
    return names(params)


def first_update(tx, params, gradient):
    return jax.jit(lambda p, g: tx.update(g, tx.init(p), p)[0])(params, gradient)


@pytest.mark.parity
@pytest.mark.parametrize("optim", ["adamw", "sgd", "adafactor"])
def test_optimizers_are_torch_over_several_steps(optim):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler
    from transformers.optimization import Adafactor

    cfg = config(
        optim=optim, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6,
        warmup_steps=2,
    )  # fmt: skip
    tx, _ = make_optimizer(cfg, 6)
    ours = trajectory(tx, drawn(0))

    tensors = {
        k: torch.tensor(np.asarray(v), requires_grad=True) for k, v in names(drawn(0)).items()
    }
    mask = names(decay_mask(drawn(0)))
    groups = [
        {"params": [t for k, t in tensors.items() if mask[k]], "weight_decay": 0.1},
        {"params": [t for k, t in tensors.items() if not mask[k]], "weight_decay": 0.0},
    ]
    made = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6),
        "sgd": lambda: torch.optim.SGD(groups, lr=1e-2),
        "adafactor": lambda: Adafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False),
    }[optim]()
    schedule = get_scheduler("linear", made, 2, 6)
    for i in range(6):
        for name, gradient in names(drawn(100 + i)).items():
            tensors[name].grad = torch.tensor(np.asarray(gradient))
        made.step()
        schedule.step()
    for name, value in ours.items():
        if optim == "adafactor" and value.ndim > 2:
            continue  # torch's factors the last two axes of a stack, optax the two longest
        np.testing.assert_allclose(
            value, tensors[name].detach().numpy(), rtol=2e-6, atol=2e-7, err_msg=name
        )


def test_transformers_names_of_adamw_are_adamw():
    runs = [
        trajectory(make_optimizer(config(optim=name, weight_decay=0.1), 6)[0], drawn(0))
        for name in ("adamw", "adamw_torch", "adamw_torch_fused")
    ]
    for other in runs[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, runs[0])


def test_lion_moves_every_entry_by_the_rate():
    tx, _ = make_optimizer(config(optim="lion", lr_scheduler_type="constant"), 6)
    params = drawn(0)
    updates = first_update(tx, params, drawn(1))
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(np.abs(update), 1e-2, rtol=1e-6)


def test_muon_orthogonalises_each_layers_weight_from_inputs_to_outputs():
    tx, _ = make_optimizer(config(optim="muon", lr_scheduler_type="constant"), 6, axes=AXES)
    params = drawn(0)
    updates = first_update(tx, params, drawn(1))
    q = np.asarray(updates["layers"]["attn"]["q"]["kernel"]).reshape(2, 4, 4)
    o = np.asarray(updates["layers"]["attn"]["o"]["kernel"]).reshape(2, 4, 4)
    for matrix in (*q, *o):
        # Newton-Schulz brings the singular values near 1; 0.2 * sqrt(4) is the size of the update.
        singular = np.linalg.svd(matrix / (1e-2 * 0.2 * 2.0), compute_uv=False)
        assert np.all((singular > 0.6) & (singular < 1.3))


@pytest.mark.parametrize(
    ("field", "value"),
    [("adam_beta1", 0.5), ("adam_beta2", 0.5), ("adam_epsilon", 1.0), ("weight_decay", 0.5),
     ("learning_rate", 0.5)],
)  # fmt: skip
def test_every_number_of_adamw_acts(field, value):
    plain = trajectory(make_optimizer(config(), 6)[0], drawn(0))
    other = trajectory(make_optimizer(config(**{field: value}), 6)[0], drawn(0))
    assert np.max(np.abs(plain["embed.table"] - other["embed.table"])) > 1e-5
