"""Fields of TRL's and transformers' configs: a field here, without effect, or refused."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest

from jrlhf import DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig, config
from jrlhf.cli import main
from jrlhf.config import aliases, foreign_names
from jrlhf.errors import ConfigError, UnsupportedFieldError
from jrlhf.foreign import ASKS_NOTHING, REFUSED, WITHOUT_EFFECT


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    config._say_once.cache_clear()


CONFIGS = [SFTConfig, RewardConfig, DPOConfig, PPOConfig, GRPOConfig]


def test_no_name_means_two_things() -> None:
    assert not set(REFUSED) & set(WITHOUT_EFFECT)
    assert set(ASKS_NOTHING) <= {name for cls in CONFIGS for name in foreign_names(cls)}
    for cls in CONFIGS:
        fields = {f.name for f in dataclasses.fields(cls)} | set(aliases(cls))
        assert not fields & foreign_names(cls), cls.__name__


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_field_that_steers_pytorch_alone_is_taken_and_said_once(cls: type) -> None:
    for name, reason in WITHOUT_EFFECT.items():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert cls(**{name: 7}) == cls()
            cls(**{name: 8})
        (text,) = (str(w.message) for w in said)
        assert text == f"{cls.__name__}: {name} changes nothing: {reason}."


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_refused_field_says_what_to_write_unless_it_asks_for_nothing(cls: type) -> None:
    for name in foreign_names(cls) - set(WITHOUT_EFFECT):
        with pytest.raises(UnsupportedFieldError, match=name):
            cls(**{name: "what nobody asks for"})
        for value in (None, False, *ASKS_NOTHING.get(name, ())):
            assert cls(**{name: value}) == cls()


@pytest.mark.parity
@pytest.mark.parametrize("name", ["SFTConfig", "RewardConfig", "DPOConfig", "GRPOConfig"])
def test_every_field_of_trl_is_known_and_its_default_accepted(name: str) -> None:
    trl = pytest.importorskip("trl")
    ours = {cls.__name__: cls for cls in CONFIGS}[name]
    unknown, refused = [], []
    for field in dataclasses.fields(getattr(trl, name)):
        if not field.init:
            continue
        value = field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ours(**{field.name: value})
            except UnsupportedFieldError:
                refused.append(f"{field.name}={value!r}")
            except ConfigError as error:
                unknown.append(f"{field.name}={value!r}: {error}")
    assert not unknown, "\n".join(unknown)
    assert not refused


@pytest.mark.parametrize("field", ["logging_steps", "save_steps", "eval_steps", "warmup_steps"])
def test_steps_are_whole_or_a_share(field: str) -> None:
    assert getattr(SFTConfig(**{field: 0.25}), field) == 0.25
    assert getattr(SFTConfig(**{field: 20.0}), field) == 20
    for wrong in (1.5, -1, -0.1):
        with pytest.raises(ConfigError, match=field):
            SFTConfig(**{field: wrong})
    if field != "warmup_steps":
        with pytest.raises(ConfigError, match=field):
            SFTConfig(**{field: 0})


def test_the_command_line_and_yaml_answer_to_the_same_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"dataloader_num_workers": 4, "logging_strategy": "steps"}))
    words = ["sft", "--config", str(file), "--dataset_name", "nowhere.jsonl", "--model", "nowhere"]
    said = [pytest.warns(UserWarning, match=f"{name} changes nothing")
            for name in ("dataloader_num_workers", "remove_unused_columns")]  # fmt: skip
    with said[0], said[1]:
        assert main([*words, "--remove_unused_columns", "False"]) == 2
    assert "nowhere" in capsys.readouterr().err  # it went on to the next mistake
    for more, hint in (
        (["--load_best_model_at_end"], "checkpoint"),
        (["--logging_strategy", "epoch"], "logging_steps"),
        (["--fp16", "true"], "bf16"),
    ):
        assert main([*words, *more]) == 2
        assert hint in capsys.readouterr().err
