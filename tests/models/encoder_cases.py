"""Every encoder family with the flags of its config, and what is measured of them.

Models are tiny and random; the oracle is transformers in float64, one text at a time.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jrlhf.auto import AutoModelForSequenceClassification, Model
from jrlhf.models import inputs
from jrlhf.models.families import family_of
from jrlhf.rollout.encode import right_padded
from tests.models.decoder_cases import LONG, YARN

LENGTHS = (21, 13, 4)
# Run for a moment: half of the time would be LLVM's optimiser. Fusions as users have them: key
# biases of DeBERTa have gradients that nearly cancel, and other orders of summing tell.
COMPILED = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
BASE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "num_labels": 1,
}
DISTILBERT = {
    "vocab_size": 101,
    "dim": 32,
    "hidden_dim": 44,
    "n_layers": 3,
    "n_heads": 4,
    "max_position_embeddings": 40,
}
# Windows shorter than the texts, and special tokens within the tiny vocabulary.
MODERNBERT = BASE | {
    "local_attention": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
# Fewer buckets than distances, on both sides of the border to the logarithm.
DEBERTA = BASE | {
    "relative_attention": True,
    "position_buckets": 8,
    "max_relative_positions": -1,
    "pos_att_type": "p2c|c2p",
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
}
# {flags: (transformers' class prefix, config)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT: gelu, token types": ("Bert", BASE),
    "BERT: tanh gelu, 3 labels, no second type": (
        "Bert",
        BASE | {"hidden_act": "gelu_new", "num_labels": 3, "type_vocab_size": 1},
    ),
    "RoBERTa: padding id 1": ("Roberta", BASE | {"pad_token_id": 1, "type_vocab_size": 1}),
    "RoBERTa: padding id 0, relu, 2 labels": (
        "Roberta",
        BASE | {"hidden_act": "relu", "num_labels": 2},
    ),
    "XLM-RoBERTa": ("XLMRoberta", BASE | {"pad_token_id": 1, "type_vocab_size": 1}),
    "DistilBERT: gelu": ("DistilBert", DISTILBERT | {"num_labels": 1}),
    "DistilBERT: relu, 3 labels": (
        "DistilBert",
        DISTILBERT | {"activation": "relu", "num_labels": 3, "sinusoidal_pos_embds": True},
    ),
    "ModernBERT: local layers, first token": ("ModernBert", MODERNBERT),
    "ModernBERT: mean, all biases, 3 labels": (
        "ModernBert",
        MODERNBERT
        | {
            "classifier_pooling": "mean",
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "num_labels": 3,
        },
    ),
    "ModernBERT: layers by name, other thetas, silu head": (
        "ModernBert",
        MODERNBERT
        | {
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 700.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 60.0},
            },
            "classifier_activation": "silu",
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "ModernBERT: longrope in full layers, yarn in local ones, 3 labels": (
        "ModernBert",
        MODERNBERT
        | {
            "num_labels": 3,
            "rope_parameters": {
                "full_attention": {**LONG, "original_max_position_embeddings": 12},
                "sliding_attention": YARN,
            },
        },
    ),
    "DeBERTa-v3: shared keys, buckets, normed positions": ("DebertaV2", DEBERTA),
    "DeBERTa-v2: convolution, tanh pooler, 3 labels": (
        "DebertaV2",
        DEBERTA
        | {
            "conv_kernel_size": 3,
            "conv_act": "gelu",
            "attention_head_size": 8,
            "num_labels": 3,
            "pooler_hidden_act": "tanh",
        },
    ),
    "DeBERTa-v2: own position weights, no buckets": (
        "DebertaV2",
        DEBERTA
        | {
            "share_att_key": False,
            "position_buckets": -1,
            "max_relative_positions": 6,
            "norm_rel_ebd": "none",
        },
    ),
    "DeBERTa-v2: c2p alone, absolute positions, token types": (
        "DebertaV2",
        DEBERTA
        | {
            "pos_att_type": "c2p",
            "share_att_key": False,
            "position_biased_input": True,
            "type_vocab_size": 2,
        },
    ),
    "DeBERTa-v2: p2c alone, narrow embedding": (
        "DebertaV2",
        DEBERTA | {"pos_att_type": "p2c", "share_att_key": False, "embedding_size": 20},
    ),
    "DeBERTa-v2: relative attention off": (
        "DebertaV2",
        DEBERTA
        | {"relative_attention": False, "norm_rel_ebd": "none", "position_biased_input": True},
    ),
    "DeBERTa-v2: relative attention off, its norm kept": (
        "DebertaV2",
        DEBERTA | {"relative_attention": False, "position_buckets": 200, "pos_att_type": "p2c"},
    ),
}


class Row(NamedTuple):
    """What one case measured.

    Attributes:
        logits: largest difference, relative to the largest logit; both paddings.
        loss: absolute difference.
        gradients: largest difference in any tensor, relative to that tensor's maximum.
        reload: whether transformers reads the export back bit for bit.
    """

    logits: float
    loss: float
    gradients: float
    reload: bool


class Batch(NamedTuple):
    """Rows of random tokens, and where padding stands when they are padded on the left."""

    ids: list[np.ndarray]
    types: list[np.ndarray]
    labels: np.ndarray

    def padded(self, *, left: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, mask and token types; padding holds ordinary tokens, which must not matter."""
        width = max(LENGTHS)
        draw = np.random.default_rng(5)
        ids = draw.integers(3, BASE["vocab_size"], (len(LENGTHS), width)).astype(np.int32)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for i, row in enumerate(self.ids):
            where = slice(width - len(row), width) if left else slice(len(row))
            ids[i, where], mask[i, where], types[i, where] = row, 1, self.types[i]
        return ids, mask, types


def perturbed(prefix: str, config: dict[str, Any], seed: int = 0) -> Any:
    """A transformers model with every parameter, norms and biases too, off its start."""
    torch.manual_seed(seed)
    made = getattr(transformers, f"{prefix}Config")(**config)
    kind = getattr(transformers, f"{prefix}ForSequenceClassification")
    model = kind(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def batch_of(config: dict[str, Any]) -> Batch:
    draw = np.random.default_rng(0)
    kinds = 1 if "dim" in config else config.get("type_vocab_size", 2)
    labels = config["num_labels"]
    return Batch(
        [draw.integers(3, BASE["vocab_size"], n) for n in LENGTHS],
        [draw.integers(0, max(kinds, 1), n) for n in LENGTHS],
        draw.normal(size=3) if labels == 1 else draw.integers(0, labels, 3),
    )


def their_scores(model: Any, batch: Batch) -> Any:
    """One row at a time, so that transformers has no padding to get wrong."""
    takes_types = getattr(model.config, "type_vocab_size", 0) > 0
    scores = []
    for ids, types in zip(batch.ids, batch.types, strict=True):
        more = {"token_type_ids": torch.tensor(types)[None]} if takes_types else {}
        scores.append(model(torch.tensor(ids)[None], **more).logits)
    return torch.cat(scores)


def their_loss(scores: Any, labels: np.ndarray) -> Any:
    if scores.shape[1] == 1:
        return torch.nn.functional.mse_loss(scores[:, 0], torch.tensor(labels))
    return torch.nn.functional.cross_entropy(scores, torch.tensor(labels))


def differentiated(model: Any, batch: Batch) -> tuple[Any, Any]:
    """Scores and loss; the gradients lie in the model."""
    scores = their_scores(model, batch)
    loss = their_loss(scores, batch.labels)
    loss.backward()
    return scores, loss


def tells(single: Any, exact: Any, batch: Batch) -> bool:
    """Whether float32 can: transformers' own gradients in it are right to half of the bound.

    Some nearly cancel (a classifier's bias over three texts, DeBERTa's keys' biases): what is left
    of them is rounding, whoever computes it.
    """
    differentiated(single, batch)
    pairs = zip(single.parameters(), exact.parameters(), strict=True)
    grads = [(a.grad.double(), b.grad) for a, b in pairs if a.grad is not None]
    largest = max(float(right.abs().max()) for _, right in grads)
    sizes = [float(right.abs().max()) for _, right in grads]
    return all(
        float((got - right).abs().max()) <= 5e-6 * size
        for (got, right), size in zip(grads, sizes, strict=True)
        if size >= 1e-10 * largest
    )


def our_loss(scores: jax.Array, labels: np.ndarray) -> jax.Array:
    if scores.shape[1] == 1:
        return jnp.mean(jnp.square(scores[:, 0] - labels.astype(np.float32)))
    logps = jax.nn.log_softmax(scores)
    return -jnp.mean(jnp.take_along_axis(logps, labels[:, None], axis=1))


def gradient_difference(model: Model, gradients: Any, theirs: Any) -> float:
    """The largest difference of any tensor, relative to its largest entry.

    Of a few tensors the exact gradient is zero (a softmax does not see what is added to all of its
    scores): their difference is relative to the largest gradient of the model.
    """
    largest = max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    worst = 0.0
    for weight in family_of(model.net.spec).weights(model.net.spec):
        for name, path, index in weight.places(model.net.spec):
            node = gradients
            for key in path:
                node = node[key]
            ours = weight.to_hf(np.asarray(node if index is None else node[index]))
            grad = theirs[name].grad
            exact = np.zeros(ours.shape) if grad is None else grad.numpy()
            scale = np.abs(exact).max()
            scale = largest if scale < 1e-10 * largest else scale
            worst = max(worst, float(np.abs(ours - exact).max() / scale))
    return worst


def reloads(model: Model, directory: Path, original: Any, batch: Batch) -> bool:
    """Whether transformers reads our export: the weights bit by bit, the config by its scores."""
    model.save_pretrained(directory)
    again, info = type(original).from_pretrained(directory, output_loading_info=True)
    state, same = original.state_dict(), again.state_dict()
    complete = not any(info.values()) and same.keys() == state.keys()
    with torch.no_grad():
        scores, back = their_scores(original, batch), their_scores(again.eval(), batch)
    alike = float((back - scores).abs().max()) <= 1e-6 * float(scores.abs().max())
    return complete and alike and all(torch.equal(same[name], state[name]) for name in state)


def measure(prefix: str, config: dict[str, Any], jit: Callable[..., Any] = COMPILED) -> Row:
    """Loads, runs, differentiates and exports one model."""
    batch = batch_of(config)
    for seed in range(20):
        original = perturbed(prefix, config, seed)
        exact = copy.deepcopy(original).double()
        scores, loss = differentiated(exact, batch)
        if tells(copy.deepcopy(original), exact, batch):
            break
    else:
        raise AssertionError(f"no draw of {prefix} ({config}) that float32 can tell")
    with tempfile.TemporaryDirectory() as folder:
        original.save_pretrained(Path(folder) / "theirs")
        model = AutoModelForSequenceClassification.from_pretrained(Path(folder) / "theirs")
        again = reloads(model, Path(folder) / "ours", original, batch)
    net = model.net

    @jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params: Any, rows: dict[str, jax.Array], lengths: jax.Array) -> Any:
        hidden = net.hidden(params, **rows, lengths=lengths)
        ours = net.scores(params, hidden, lengths)
        return our_loss(ours, batch.labels), ours

    differences = []
    for left in (False, True):
        ids, mask, types = batch.padded(left=left)
        ids, mask = inputs.tokens(net.spec, ids, mask)
        where = inputs.positions(net.spec, None, mask)
        placed = right_padded(net.spec, ids, mask, where, inputs.types(net.spec, types, ids))
        (value, ours), gradients = run(model.params, *placed)
        differences.append(np.abs(np.asarray(ours) - scores.detach().numpy()).max())
    return Row(
        float(max(differences) / scores.detach().abs().max()),
        abs(float(value) - float(loss.detach())),
        gradient_difference(model, gradients, dict(exact.named_parameters())),
        again,
    )
