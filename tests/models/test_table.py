"""The committed tables are complete, and hold what the issue of trust is about: their bounds."""

from __future__ import annotations

import pytest

from tests.models import table
from tests.models.table import plain

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.parity


def committed(name: str) -> dict[tuple[str, str], list[str]]:
    return {(row[0], row[1]): [*row[2:]] for row in table.committed(name)}


def test_every_decoder_case_stands_in_the_table_within_its_bounds() -> None:
    from tests.models.decoder_cases import NAMED

    rows = committed("decoders")
    assert rows.keys() == {(family, plain(flags)) for family, flags in NAMED}
    for row in rows.values():
        logits, loss, gradients, tokens, export = row
        assert float(logits) <= 1e-5
        assert float(loss) <= 2e-6
        assert float(gradients) <= 1e-5
        assert (tokens, export) == ("64 of 64", "bitwise")


def test_every_encoder_case_stands_in_the_table_within_its_bounds() -> None:
    from tests.models.encoder_cases import CASES

    rows = committed("encoders")
    names = (name.partition(": ") for name in CASES)
    assert rows.keys() == {(family, flags) for family, _, flags in names}
    for row in rows.values():
        scores, loss, gradients, export = row
        assert float(scores) <= 1e-5
        assert float(loss) <= 2e-6
        assert float(gradients) <= 1e-5
        assert export == "bitwise"


@pytest.mark.parametrize(
    ("name", "families", "tokens"),
    [("decoder-flags", "DECODERS", ["64 of 64"]), ("encoder-flags", "ENCODERS", [])],
)
def test_all_combinations_of_flags_stand_in_the_table_within_their_bounds(
    name: str, families: str, tokens: list[str]
) -> None:
    from tests.models import flag_products

    flags = getattr(flag_products, families)
    rows = committed(name)
    assert rows.keys() == {(family, flag_products.say(own)) for family, own in flags.items()}
    for (family, _), (count, logits, loss, gradients, *more) in rows.items():
        assert int(count) == flag_products.count(flags[family])
        assert float(logits) <= 1e-5
        assert float(loss) <= 2e-6
        assert float(gradients) <= 1e-5
        assert more == [*tokens, "bitwise"]
