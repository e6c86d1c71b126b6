"""Adapters against PEFT: the same modules, logits both ways, gradients, and bitwise equal files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jrlhf.auto import Model
from jrlhf.models.build import Net, combine, partition
from jrlhf.models.families import spec_from_config
from jrlhf.models.load import flatten, load_pretrained
from jrlhf.models.lora import files, tree
from jrlhf.models.lora.config import LoraConfig
from jrlhf.peft import PeftModel, get_peft_model

pytestmark = pytest.mark.parity
CONFIG: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "attention_bias": True,
    "max_position_embeddings": 64,
    "num_labels": 2,
}
# Without 0, the padding: torch gives its embedding no gradient.
IDS = np.random.default_rng(0).integers(1, 40, (2, 7))
CASES: dict[str, dict[str, Any]] = {
    "patterns, rank-stabilised": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": "all-linear",
        "exclude_modules": ["2.mlp.up_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6, r"layers\.2\..*o_proj": 3},
        "alpha_pattern": {"v_proj": 16, "down_proj": 5},
    },
    "magnitudes, some layers, whole modules": {
        "r": 3,
        "use_dora": True,
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
        "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"],
    },
    "the embedding of a tied model": {
        "r": 2,
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "a classifier": {"r": 2, "task_type": "SEQ_CLS", "lora_dropout": 0.5},
}


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama and a classifier on disk, every weight off its start."""
    import torch
    import transformers

    paths = {}
    for name in ("LlamaForCausalLM", "LlamaForSequenceClassification", "tied LlamaForCausalLM"):
        torch.manual_seed(0)
        kind, tied = name.removeprefix("tied "), name.startswith("tied")
        model = getattr(transformers, kind)(
            transformers.LlamaConfig(
                **CONFIG, pad_token_id=0, attn_implementation="eager", tie_word_embeddings=tied
            )
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
        paths[name] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(paths[name])
    return paths


def pair(origins: dict[str, Path], fields: dict[str, Any]) -> tuple[Any, Model]:
    """transformers' base and ours."""
    import transformers

    head = "classifier" if fields.get("task_type") == "SEQ_CLS" else "causal"
    kind = {"causal": "LlamaForCausalLM", "classifier": "LlamaForSequenceClassification"}[head]
    origin = origins[f"tied {kind}" if fields.get("ensure_weight_tying") else kind]
    theirs = getattr(transformers, kind).from_pretrained(origin, attn_implementation="eager")
    net, params, source = load_pretrained(origin, head=head)
    return theirs.eval(), Model(net, params, source=source)


def logits_and_gradient(model: PeftModel, weights: np.ndarray) -> tuple[np.ndarray, Any]:
    """Logits, and the gradient of sum(weights * logits) by the adapter."""
    net = model.net

    def loss(trainable: Any, frozen: Any) -> tuple[jax.Array, jax.Array]:
        params = combine(trainable, frozen)
        hidden = net.hidden(params, IDS)
        if net.spec.head == "classifier":
            logits = net.scores(params, hidden, np.full(len(IDS), IDS.shape[1]))
        else:
            logits = net.logits(params, hidden)
        return jnp.sum(logits * weights), logits

    run = jax.jit(jax.grad(loss, has_aux=True))
    gradient, logits = run(*partition(model.params, net))
    return np.asarray(logits), gradient["adapters"]["default"]


def by_name(model: PeftModel, own: Any) -> dict[str, np.ndarray]:
    """An adapter's leaves (or their gradient) under the names of its file."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(own).items()}
    (plan,) = model.net.adapters
    return files.assemble(leaves, plan, tree.weights(model.net.spec))


def file_name(parameter: str) -> str:
    """PEFT's parameter under the name of its file."""
    name = parameter.replace(".modules_to_save.default", "").replace(".default", "")
    return name.removesuffix(".weight") if "magnitude" in name else name


def close(ours: Any, theirs: Any, what: str) -> None:
    theirs = np.asarray(theirs)
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max(), what


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_peft_and_jrlhf_load_each_others_adapters(
    fields: dict[str, Any], origins: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    import peft
    import torch

    torch.manual_seed(1)
    fields = copy.deepcopy(fields)  # PEFT adds to its lists
    theirs, base = pair(origins, fields)
    model = peft.get_peft_model(theirs, peft.LoraConfig(**fields, init_lora_weights=False)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name or "modules_to_save" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")

    ours = PeftModel.from_pretrained(base, tmp_path / "theirs")
    expected = model.double()(torch.tensor(IDS)).logits
    weights = np.random.default_rng(2).normal(size=expected.shape).astype(np.float32)
    logits, gradient = logits_and_gradient(ours, weights)
    close(logits, expected.detach(), "logits")
    ours.print_trainable_parameters()
    said = capsys.readouterr().out
    model.print_trainable_parameters()
    assert said == capsys.readouterr().out
    assert ours.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]

    (expected * torch.tensor(weights)).sum().backward()
    wanted = {file_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = by_name(ours, gradient)
    if fields.get("ensure_weight_tying"):
        head = found.pop("base_model.model.lm_head.weight")
        np.testing.assert_array_equal(head, found["base_model.model.model.embed_tokens.weight"])
    assert set(found) == set(wanted)
    for name, value in found.items():
        close(value, wanted[name], name)

    # Back again, and an adapter that was born here.
    ours.save_pretrained(tmp_path / "ours")
    first, second = (load_file(tmp_path / n / "adapter_model.safetensors") for n in
                     ("theirs", "ours"))  # fmt: skip
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    born = get_peft_model(base, LoraConfig(**fields, init_lora_weights=False), seed=3)
    born.save_pretrained(tmp_path / "born")
    back = peft.PeftModel.from_pretrained(pair(origins, fields)[0], tmp_path / "born")
    for name, tensor in peft.get_peft_model_state_dict(back).items():
        np.testing.assert_array_equal(by_name(born, born.params["adapters"]["default"])[name],
                                      tensor.numpy())  # fmt: skip
    expected = back.eval().double()(torch.tensor(IDS)).logits.detach()
    close(logits_and_gradient(born, weights)[0], expected, "logits of ours in PEFT")


MOE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
       "num_key_value_heads": 2, "head_dim": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
       "initializer_range": 0.3, "attn_implementation": "eager"}  # fmt: skip
QWEN = {"num_experts": 4, "moe_intermediate_size": 12, "intermediate_size": 20}
EXPERTS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "Mixtral: experts and router": (
        "Mixtral", {"num_local_experts": 4, "intermediate_size": 12}, ["experts", "gate"],
    ),
    "Qwen3-MoE: experts": ("Qwen3Moe", QWEN, ["experts"]),
    "Qwen3-MoE with a plain MLP: router": ("Qwen3Moe", QWEN | {"mlp_only_layers": [1]}, ["gate"]),
    "Qwen3-MoE with a plain MLP: experts": (
        "Qwen3Moe", QWEN | {"mlp_only_layers": [1]}, ["experts"],
    ),
    "GPT-OSS: experts and router": (
        "GptOss", {"num_local_experts": 4, "intermediate_size": 12}, ["experts", "router"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "sizes", "saved"), EXPERTS.values(), ids=EXPERTS.keys())
def test_routers_and_experts_are_trained_whole_as_in_peft(
    name: str, sizes: dict[str, Any], saved: list[str], tmp_path: Path
) -> None:
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MOE, **sizes)
    config._experts_implementation = "eager"
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(tmp_path / "base")
    fields: dict[str, Any] = {"r": 3, "target_modules": ["q_proj"], "modules_to_save": saved}

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", attn_implementation="eager", experts_implementation="eager"
        )

    model = peft.get_peft_model(base(), peft.LoraConfig(**fields, init_lora_weights=False)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    net, params, source = load_pretrained(tmp_path / "base")
    plain = Model(net, params, source=source)
    ours = PeftModel.from_pretrained(plain, tmp_path / "theirs")
    expected = model.double()(torch.tensor(IDS)).logits.detach()
    close(ours(IDS).logits, expected, "logits of PEFT's adapter here")
    assert ours.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    ours.save_pretrained(tmp_path / "ours")
    first, second = (load_file(tmp_path / n / "adapter_model.safetensors") for n in
                     ("theirs", "ours"))  # fmt: skip
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval().double()
    close(ours(IDS).logits, back(torch.tensor(IDS)).logits.detach(), "logits of ours in PEFT")


SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
# Weights that are one in the checkpoint and several maps here: one A, and a part of B for each.
FUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "GPT-2": ("GPT2", {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4},
              {"use_dora": True, "fan_in_fan_out": True}),
    "GPT-NeoX": ("GPTNeoX", {**SMALL, "intermediate_size": 24}, {"target_modules": "all-linear"}),
    "Phi-3": ("Phi3", {**SMALL, "intermediate_size": 24, "num_key_value_heads": 2,
                       "pad_token_id": 0}, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FUSED)
def test_fused_weights_share_one_a_as_in_peft(kind: str, tmp_path: Path) -> None:
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    name, config, fields = FUSED[kind]
    theirs = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{name}Config")(**config), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "base")
    net, params, source = load_pretrained(tmp_path / "base")
    base = Model(net, params, source=source)
    chosen = peft.LoraConfig(r=3, **fields, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(theirs, chosen).eval()
    model.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(base, tmp_path / "theirs")
    assert ours.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]

    expected = model.double()(torch.tensor(IDS)).logits
    weights = np.random.default_rng(2).normal(size=expected.shape).astype(np.float32)
    logits, gradient = logits_and_gradient(ours, weights)
    close(logits, expected.detach(), "logits")
    (expected * torch.tensor(weights)).sum().backward()
    wanted = {file_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = by_name(ours, gradient)
    assert set(found) == set(wanted)
    for tensor, value in found.items():
        close(value, wanted[tensor], tensor)
    ours.save_pretrained(tmp_path / "ours")
    first, second = (load_file(tmp_path / n / "adapter_model.safetensors") for n in
                     ("theirs", "ours"))  # fmt: skip
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[tensor], second[tensor]) for tensor in first)


MODULES: dict[str, dict[str, Any]] = {
    **CASES,
    "the default": {},
    "an expression": {"target_modules": r".*\.[01]\..*(up|q)_proj", "lora_alpha": 3},
    "full names": {"target_modules": ["model.layers.1.mlp.gate_proj", "self_attn.v_proj"]},
    "an excluded expression": {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    "saved instead": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["q_proj"]},
    "one layer": {"target_modules": ["k_proj"], "layers_to_transform": 1},
    "sets": {
        "target_modules": {"q_proj", "up_proj"},
        "exclude_modules": {"2.mlp.up_proj"},
        "layers_to_transform": {0, 2},
        "layers_pattern": {"layers"},
        "modules_to_save": {"lm_head", "norm"},
    },
    "tuples": {
        "target_modules": ("q_proj", "up_proj"),
        "exclude_modules": ("2.mlp.up_proj",),
        "layers_to_transform": (0, 2),
        "layers_pattern": ("layers",),
        "modules_to_save": ("lm_head", "norm"),
    },
}


@pytest.mark.parametrize("fields", MODULES.values(), ids=MODULES.keys())
def test_the_same_modules_are_adapted_with_the_same_ranks_and_scales(
    fields: dict[str, Any], origins: dict[str, Path]
) -> None:
    import peft

    fields = copy.deepcopy(fields)  # PEFT adds to its lists
    theirs, base = pair(origins, fields)
    model = peft.get_peft_model(theirs, peft.LoraConfig(**fields))
    wanted = {
        name.removeprefix("base_model.model."): (
            module.r["default"], pytest.approx(module.scaling["default"]),
        )
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }  # fmt: skip
    plan = base.net.adapter(LoraConfig(**fields))
    found = {
        name: (rank, scale)
        for target in plan.targets
        for name, rank, scale in zip(target.names, target.ranks, target.scales, strict=True)
        if rank
    }
    assert found == wanted
    own = base.net.abstract()
    saved = sum(tree.get(own, path).size for path in plan.saved)
    whole = [p.numel() for n, p in model.named_parameters() if "modules_to_save" in n]
    assert saved == sum(whole)


def test_pefts_own_config_is_taken_and_its_defaults_are_ours() -> None:
    import dataclasses

    import peft

    spec = spec_from_config({"model_type": "llama", **CONFIG})
    theirs = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ours = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    net = Net(spec)
    model = Model(net, jax.jit(net.init)(jax.random.key(0)))
    adapted = get_peft_model(model, theirs)  # type: ignore[arg-type]
    assert adapted.net.adapters == (net.adapter(ours),)
    plain = peft.LoraConfig().to_dict()
    for field in dataclasses.fields(LoraConfig):
        assert (field.default or None) == (plain[field.name] or None), field.name
