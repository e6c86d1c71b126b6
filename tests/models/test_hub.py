"""Models by their names on the hub, which a stand-in on this machine answers for."""

from __future__ import annotations

import numpy as np
import pytest

from jrlhf import AutoModelForCausalLM
from jrlhf.errors import MissingFileError
from tests.models.conftest import HFDirectory
from tests.standin_hub import StandInHub


def test_a_model_comes_from_the_hub_by_name(
    hf_directory: HFDirectory, standin_hub: StandInHub
) -> None:
    origin, _ = hf_directory(shards=2)
    files = {path.name: path.read_bytes() for path in origin.iterdir()}
    other = {"pytorch_model.bin": b"pickles", "onnx/model.safetensors": b"a copy"}
    standin_hub.files["someone/tiny-llama"] = files | other
    model = AutoModelForCausalLM.from_pretrained("someone/tiny-llama")
    assert sorted(standin_hub.sent) == sorted(files)
    ids = np.arange(6)[None]
    expected = AutoModelForCausalLM.from_pretrained(origin)(ids).logits
    np.testing.assert_array_equal(model(ids).logits, expected)
    # What is in the cache is not fetched again.
    AutoModelForCausalLM.from_pretrained("someone/tiny-llama")
    assert sorted(standin_hub.sent) == sorted(files)


def test_a_revision_is_asked_for(hf_directory: HFDirectory, standin_hub: StandInHub) -> None:
    origin, _ = hf_directory()
    files = {path.name: path.read_bytes() for path in origin.iterdir()}
    standin_hub.files["someone/tiny-llama"] = files
    model = AutoModelForCausalLM.from_pretrained("someone/tiny-llama", revision="v2")
    assert (model.source.path.parents[1] / "refs" / "v2").is_file()
    assert model.name_or_path == "someone/tiny-llama"


def test_a_name_that_the_hub_does_not_have_is_named(standin_hub: StandInHub) -> None:
    with pytest.raises(MissingFileError, match=r"someone/typo.*could not be had") as caught:
        AutoModelForCausalLM.from_pretrained("someone/typo")
    assert "check the spelling" in str(caught.value)
