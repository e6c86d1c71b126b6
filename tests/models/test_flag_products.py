"""Some combinations of each family's flags; `python -m tests.models.table` measures all of them."""

from __future__ import annotations

import itertools
import random
import re

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

import transformers  # noqa: E402
from transformers import CONFIG_MAPPING  # noqa: E402

from jrlhf.models.families import FAMILIES  # noqa: E402
from tests.models import encoder_cases, flag_products  # noqa: E402
from tests.models.decoder_cases import BASE  # noqa: E402
from tests.models.decoder_measure import measure  # noqa: E402
from tests.models.test_families import REFUSED  # noqa: E402

encoder_cases.torch.set_num_threads(1)  # tiny matrices: a second thread only spins
EACH = 2


def drawn(families):
    """Combinations that no case has, the same in every run; the second with other numbers."""
    for family, flags in families.items():
        every = list(flag_products.products(flags))
        first, second = random.Random(family).sample(every, EACH)
        yield pytest.param(family, first, id=f"{family}-{every.index(first)}")
        numbers = flag_products.NUMBERS[flag_products.prefix(family)]
        yield pytest.param(family, second | numbers, id=f"{family}-{every.index(second)}-numbers")


def assert_within_bounds(found):
    assert found["logits"] <= 1e-5
    assert found["loss"] <= 2e-6
    assert found["gradients"] <= 1e-5
    assert found["reload"]


@pytest.mark.parametrize(("family", "changes"), list(drawn(flag_products.DECODERS)))
def test_flags_of_a_decoder_combine(family, changes):
    assert_within_bounds(measure(family, changes))


@pytest.mark.parametrize(("family", "changes"), list(drawn(flag_products.ENCODERS)))
def test_flags_of_an_encoder_combine(family, changes):
    prefix = flag_products.prefix(family)
    assert_within_bounds(encoder_cases.measure(prefix, changes)._asdict())


def test_every_family_has_its_flags():
    from tests.models.decoder_cases import CASES

    assert flag_products.DECODERS.keys() == CASES.keys()
    products = {flag_products.prefix(name) for name in flag_products.ENCODERS}
    assert products == {prefix for prefix, _ in encoder_cases.CASES.values()}


# What no forward pass here reads: dropout, how weights began, the cache's switch, other heads.
UNREAD = re.compile(
    r"(.*_)?(dropout|pdrop|layerdrop)(_prob)?|init_std|initializer_.*|use_cache|summary_.*"
    r"|(bos|eos|pad|cls|sep)_token_id|decoder_bias|sparse_pred.*|legacy|initializer_cutoff_factor"
    # Of training alone; how a kernel runs; a product of the old tensor parallelism.
    r"|router_jitter_noise|deterministic_flash_attn|reorder_and_upcast_attn|pretraining_tp"
)
# Shapes alone: every axis of a tiny model has its size, whatever that is.
SIZES = re.compile(
    r"vocab_size|hidden_size|(moe_)?intermediate_size|hidden_dim|dim|ffn_dim|n_embd"
    r"|(n|num_hidden)_layers?|(n|num_attention|num_key_value)_heads?|num_(local_)?experts"
    r"|max_position_embeddings|n_positions|n_ctx|head_dim"
)
ALL = flag_products.DECODERS | flag_products.ENCODERS
# test_encoder_configs
REFUSED_OF_ENCODERS = {
    **{name: {"is_decoder", "add_cross_attention"} for name in ("Bert", "Roberta", "XLMRoberta")},
    "DebertaV2": {"attention_head_size", "pooler_hidden_size"},
}
# Keys that have one value in all products of a family and in the numbers beside them, and why.
FIXED: dict[str, dict[str, str]] = {
    "gemma3_text": {
        "_sliding_window_pattern": "says what layer_types says; test_families reads it"
    },
    "smollm3": {
        "layer_types": "says what the windows say",
        "no_rope_layer_interval": "says what no_rope_layers says; test_families reads it",
    },
    "gpt_neox": {"is_decoder": "a mark of the class: transformers' GPT-NeoX reads it nowhere"},
    "gpt_oss": {"hidden_act": "the gate of its experts is its own"},
    **{
        flag_products.prefix(name): {"tie_word_embeddings": "a classifier has no head to tie"}
        for name in flag_products.ENCODERS
    },
}


def values_of(family, flags):
    """{key: its values in the products of a family and in the numbers beside them}."""
    encoder = family in map(flag_products.prefix, flag_products.ENCODERS)
    config = getattr(transformers, f"{family}Config") if encoder else CONFIG_MAPPING[family]
    defaults = config().to_dict()
    found = {key: set() for key in defaults.keys() - transformers.PretrainedConfig().to_dict()}
    base = {} if encoder else BASE
    for changes in itertools.chain(*map(flag_products.products, flags)):
        for key in found.keys() | changes.keys():
            value = (base | changes).get(key, defaults.get(key))
            found.setdefault(key, set()).add(repr(value))
    for key, value in flag_products.NUMBERS[family].items():
        found[key].add(repr(value))
    return found


@pytest.mark.parametrize("family", sorted({*map(flag_products.prefix, ALL)}))
def test_every_key_of_a_config_varies_or_is_refused_or_read_nowhere_or_says_why_not(family):
    flags = [flags for name, flags in ALL.items() if flag_products.prefix(name) == family]
    refused = {key for name, changes, _ in REFUSED if name == family for key in changes}
    refused |= REFUSED_OF_ENCODERS.get(family, set())
    fixed = {
        key
        for key, values in values_of(family, flags).items()
        if len(values) == 1 and key not in refused
        if not UNREAD.fullmatch(key) and not SIZES.fullmatch(key)
    }
    assert fixed == FIXED.get(family, {}).keys()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_other_names_of_a_config_s_keys_are_those_of_transformers(family):
    assert FAMILIES[family].aliases == CONFIG_MAPPING[family].attribute_map
