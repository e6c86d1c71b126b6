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
        numbers = flag_products.NUMBERS[family]
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
    assert_within_bounds(encoder_cases.measure(family, changes)._asdict())


def test_every_family_has_its_flags():
    from tests.models.decoder_cases import CASES

    assert flag_products.DECODERS.keys() == CASES.keys()
    assert flag_products.ENCODERS.keys() == {prefix for prefix, _ in encoder_cases.CASES.values()}


# What no forward pass here reads: dropout, how weights began, the cache's switch, other heads.
UNREAD = re.compile(
    r"(.*_)?(dropout|pdrop|layerdrop)(_prob)?|init_std|initializer_.*|use_cache|summary_.*"
    r"|(bos|eos|pad)_token_id|decoder_bias|sparse_pred.*|legacy|initializer_cutoff_factor"
    # Of training alone; how a kernel runs; a product of the old tensor parallelism.
    r"|router_jitter_noise|deterministic_flash_attn|reorder_and_upcast_attn|pretraining_tp"
)
# What says the same as a key in a product (cases and test_families read it), or nothing.
SPELLED = {
    "gemma3_text": {"_sliding_window_pattern"},
    "smollm3": {"layer_types", "no_rope_layer_interval"},
    # A mark of the class: transformers' GPT-NeoX reads it nowhere.
    "gpt_neox": {"is_decoder"},
    # The gate of its experts is its own.
    "gpt_oss": {"hidden_act"},
    # Heads that classify have no embedding to be tied to.
    **{name: {"tie_word_embeddings"} for name in flag_products.ENCODERS},
}


@pytest.mark.parametrize("family", [*flag_products.DECODERS, *flag_products.ENCODERS])
def test_every_key_of_a_config_is_in_a_product_or_refused_or_read_nowhere(family):
    encoder = family in flag_products.ENCODERS
    flags = (flag_products.ENCODERS if encoder else flag_products.DECODERS)[family]
    settings = itertools.chain(*flags.values())
    used = {key for setting in settings for key in setting} | flag_products.NUMBERS[family].keys()
    used |= encoder_cases.BASE.keys() if encoder else BASE.keys()
    used |= {key for name, changes, _ in REFUSED if name == family for key in changes}
    if encoder:
        used |= {"is_decoder", "add_cross_attention", "pooler_hidden_size"}  # test_encoders
    config = getattr(transformers, f"{family}Config") if encoder else CONFIG_MAPPING[family]
    keys = config().to_dict().keys() - transformers.PretrainedConfig().to_dict().keys()
    left = {key for key in keys - used if not UNREAD.fullmatch(key)}
    assert left == SPELLED.get(family, set())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_other_names_of_a_config_s_keys_are_those_of_transformers(family):
    assert FAMILIES[family].aliases == CONFIG_MAPPING[family].attribute_map
