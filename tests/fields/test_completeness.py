"""No config has a field that the tables of this directory do not flip."""

from __future__ import annotations

import pytest

from jrlhf.config import TrainingConfig
from tests.fields import (
    test_every_face,
    test_loop_fields,
    test_offline_fields,
    test_online_fields,
    test_policy_fields,
)
from tests.fields.bench import FACES, declared

# What a face shows for itself, and what one table shows for all of them.
OWN = (test_offline_fields.TABLES, test_online_fields.TABLES, test_policy_fields.TABLES)
SHARED = (test_every_face.TABLE, test_loop_fields.TABLE, test_loop_fields.RUNS)


@pytest.mark.parametrize("face", FACES)
def test_every_field_is_flipped(face: str) -> None:
    shown = {name for table in SHARED for name in table}
    assert shown <= set(declared(TrainingConfig)), "a shared table names a field that is not shared"
    own = {name for tables in OWN for name in tables.get(face, {})}
    fields = set(declared(FACES[face][0]))
    assert not own - fields, "a table names a field that is not there"
    assert not fields - own - shown, "give each of these an entry in a table"
