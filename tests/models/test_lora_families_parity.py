"""Every decoder family's adapters go both ways between PEFT on transformers' model and here."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_calls")]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from jrlhf import AutoModelForCausalLM  # noqa: E402
from jrlhf.errors import UnsupportedFieldError  # noqa: E402
from jrlhf.models.families import DECODERS  # noqa: E402
from jrlhf.models.lora.config import LoraConfig  # noqa: E402
from jrlhf.peft import PeftModel, get_peft_model  # noqa: E402
from tests.models.decoder_cases import CASES  # noqa: E402
from tests.models.decoder_measure import relative, rows, their_logits, theirs  # noqa: E402

# Each family's first case, and two with maps that the first has not.
BASES = [(family, next(iter(cases))) for family, cases in CASES.items()] + [
    ("opt", "opt-350m: norms after, narrow embeddings"),
    ("qwen3_moe", "plain MLPs in some layers *"),
]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Where PEFT's "all-linear" also means experts and routers: parameters, no linear maps. The others'
# experts and routers it leaves alone.
WIDER = {"mixtral", "qwen3_moe"}
DRAWN = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}


def tensors(directory):
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize(("family", "flags"), BASES)
def test_an_adapter_on_every_linear_map_goes_both_ways(family, flags, tmp_path):
    model = theirs(family, CASES[family][flags])
    model.save_pretrained(tmp_path / "base")
    other, plain = copy.deepcopy(model), their_logits(model)
    base, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), rows()[0]["ids"][:1]

    wanted = ATTENTION if family in WIDER else "all-linear"
    made = peft.get_peft_model(model, peft.LoraConfig(target_modules=wanted, **DRAWN)).eval()
    made.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(base, tmp_path / "theirs")
    expected = their_logits(made.double())
    assert relative(plain, expected) > 0.01  # the adapter says something
    assert relative(ours(ids).logits, expected) <= 1e-5
    assert ours.get_nb_trainable_parameters()[0] == made.get_nb_trainable_parameters()[0]

    with jax.default_prng_impl("unsafe_rbg"):  # which compiles in a fifth of the time
        born = get_peft_model(base, LoraConfig(target_modules="all-linear", **DRAWN), seed=3)
    born.save_pretrained(tmp_path / "ours")
    assert tensors(tmp_path / "ours").keys() == tensors(tmp_path / "theirs").keys()
    back = peft.PeftModel.from_pretrained(other, tmp_path / "ours").eval()
    # Of what is missing PEFT only warns.
    held, file = peft.get_peft_model_state_dict(back), tensors(tmp_path / "ours")
    assert held.keys() == file.keys()
    assert all(np.array_equal(held[name], file[name]) for name in file)
    expected = their_logits(back.double())
    assert relative(plain, expected) > 0.01
    assert relative(born(ids).logits, expected) <= 1e-5


def test_every_family_is_compared():
    assert CASES.keys() == DECODERS.keys()


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mixtral", {"target_modules": "all-linear"}),
        ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
        ("mixtral", {"target_modules": ["q_proj", "gate"]}),
        ("qwen3_moe", {"target_modules": "all-linear"}),
        ("qwen3_moe", {"target_modules": ["gate_proj", "up_proj"]}),
        ("gpt_oss", {"target_modules": ["q_proj"],
                     "target_parameters": ["mlp.experts.gate_up_proj"]}),
    ],
)  # fmt: skip
def test_pefts_adapters_on_experts_and_routers_are_refused_by_name(family, fields, tmp_path):
    model = theirs(family, next(iter(CASES[family].values())))
    model.save_pretrained(tmp_path / "base")
    made = peft.get_peft_model(model, peft.LoraConfig(**fields, **DRAWN))
    made.save_pretrained(tmp_path / "theirs")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedFieldError, match="target_parameters is not supported: only"):
        PeftModel.from_pretrained(base, tmp_path / "theirs")
    with pytest.raises(UnsupportedFieldError, match="target_parameters is not supported: only"):
        get_peft_model(base, made.peft_config["default"])
