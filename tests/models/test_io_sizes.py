"""Sizes of weight files, as users write them."""

from __future__ import annotations

import pytest

from jrlhf.errors import ConfigError
from jrlhf.models.hf.writer import parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("2MiB", 2 * 2**20), (" 7 kb ", 7000), (9, 9), ("9B", 9)]
)
def test_sizes_are_read_as_transformers_reads_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1.5GB", "5 potatoes"])
def test_what_is_no_size_is_an_error(text):
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(text)
