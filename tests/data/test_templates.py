"""Which words are the assistant's, for chat templates that do not mark them."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jrlhf.data.encode import Encoder
from jrlhf.data.templates import CHATML, Chat, render
from jrlhf.errors import TokenizerError

UNMARKED = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", CHATML)
# As SmolLM2's: a system turn that nobody wrote comes first.
SYSTEM = "{%- if messages[0]['role'] != 'system' -%}{{- '<|im_start|>system\\nHi<|im_end|>\\n' -}}{%- endif -%}"  # noqa: E501
# As Qwen 3's: reasoning of earlier turns is dropped.
FORGETFUL = """{%- for m in messages -%}{{- m['role'] + ': ' -}}
{%- if m['role'] == 'assistant' and loop.last -%}{{- '<think>' -}}{%- endif -%}
{{- m['content'] + '\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"""


def talk(*texts: str) -> Chat:
    roles = ("user", "assistant") * len(texts)
    return Chat([{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)])


@pytest.mark.parametrize("head", ["", SYSTEM], ids=["plain", "system"])
@pytest.mark.parametrize(
    "texts",
    [
        ("The sky?", "It is blue."),
        ("The sky?", " It is blue. \n", "And\n\nyou?", "fine"),
        ("a<|im_end|>\n<|im_start|>assistant\nb", "the sky <|im_end|> is", "c", "so"),
    ],
    ids=["one", "spaces", "specials"],
)
def test_marks_that_are_missing_are_found(
    head: str, texts: tuple[str, ...], tokenizer: Any
) -> None:
    """Ids are the template's own either way; the masks are those of the marked template."""
    marked, plain = (
        Encoder(tokenizer, chat_template=head + template).assistant_chats([talk(*texts)])[0]
        for template in (CHATML, UNMARKED)
    )
    np.testing.assert_array_equal(plain[0], marked[0])
    np.testing.assert_array_equal(plain[1], marked[1])
    assert marked[1].any()


def test_a_turn_that_changes_later_is_an_error_and_alone_is_none(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, chat_template=FORGETFUL)
    ((ids, mask),) = encoder.assistant_chats([talk("a", "b")])
    assert tokenizer.decode(ids[mask > 0]) == "<think>b"
    with pytest.raises(TokenizerError, match=r"row 7.*otherwise when others follow"):
        encoder.assistant_chats([talk("a", "b", "c", "d")], where=["row 7"])


# Families whose training template in TRL 1.16 marks the very words, but for white space at the ends
# (Qwen 2.5's marks begin with the line break of the header).
@pytest.mark.parity
@pytest.mark.parametrize(
    "family",
    ["llama3", "qwen2_5", "qwen3", "qwen3_instruct_2507", "gemma3", "smolvlm", "cohere", "lfm2"],
)
def test_the_words_are_those_that_trl_marks(family: str) -> None:
    from importlib.resources import files

    pytest.importorskip("trl")
    folder = files("trl") / "chat_templates"
    original, training = (
        (folder / f"{family}{kind}.jinja").read_text(encoding="utf-8") for kind in ("", "_training")
    )
    assert "endgeneration" not in original
    tokenizer: Any = SimpleNamespace(special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"})
    chats = [talk("Hi there", "  Hello you. \n"), talk("Hi", "Yes.", "And?", "No.")]
    for chat in chats[: 1 if family == "qwen3" else 2]:  # which drops earlier reasoning
        found = render(tokenizer, chat, chat_template=original, spans=True)
        marked = render(tokenizer, chat, chat_template=training, spans=True)
        assert found.text == marked.text
        words = [[x.text[a:b].strip() for a, b in x.spans] for x in (found, marked)]
        assert words[0] == words[1]
        assert all(words[0])
