"""Chat templates: rendering conversations to text, with the spans that the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from jrlhf.errors import DataError, TokenizerError

# The plain ChatML template, with the assistant's turns (and the token that ends them) marked.
CHATML = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

_NO_MARKS = (
    "assistant_only_loss=True needs to know which words are the assistant's. The chat template has "
    "no {{% generation %}} marks, and {}. Add the marks around the assistant's turns "
    "(chat_template_path), give one answer per row, or use a prompt-completion dataset."
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat(NamedTuple):
    """One conversation and what its template may read besides the messages."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    kwargs: dict[str, Any] | None = None


class Rendered(NamedTuple):
    """A conversation as text, with the character spans that the assistant wrote."""

    text: str
    spans: list[tuple[int, int]]


def template_of(tokenizer: Any, chat_template: str | None, tools: Any = None) -> str:
    """The template to use: the one given, else the tokenizer's.

    Raises:
        TokenizerError: there is none.
    """
    if chat_template is not None:
        return chat_template
    if not tokenizer.chat_template:
        raise TokenizerError(
            "The dataset is conversational, but the tokenizer has no chat template. Set "
            "tokenizer.chat_template (for example to jrlhf.data.templates.CHATML), or use the "
            "tokenizer of an instruction-tuned model."
        )
    return tokenizer.get_chat_template(None, tools)


def render(
    tokenizer: Any,
    chat: Chat,
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    spans: bool = False,
    where: str = "",
) -> Rendered:
    """Renders one conversation.

    Args:
        tokenizer: supplies the template and its special tokens.
        chat: the conversation.
        chat_template: used in place of the tokenizer's.
        add_generation_prompt: append the header of an assistant turn.
        continue_final_message: leave the last message open, to be continued.
        spans: also report what the assistant wrote: the {% generation %} blocks, or, where the
            template has none, what follows the header of each assistant turn.
        where: row named by errors.

    Raises:
        DataError: the template refuses the conversation.
        TokenizerError: with `spans`, the template does not tell where the assistant's words are.
    """
    tools = chat.tools or None  # Llama's template prints tool boilerplate for an empty list
    template = template_of(tokenizer, chat_template, tools)
    marked = spans and _GENERATION.search(template) is not None

    def write(messages: list[dict[str, Any]], **options: bool) -> tuple[str, list[Any]]:
        return _jinja(tokenizer, template, Chat(messages, tools, chat.kwargs), where, options)

    text, blocks = write(
        chat.messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        return_assistant_tokens_mask=marked,
    )
    if spans and not marked:
        blocks = _turns(lambda m, header: write(m, add_generation_prompt=header)[0],
                        chat.messages, text, where)  # fmt: skip
    return Rendered(text, [tuple(block) for block in blocks])


def _jinja(
    tokenizer: Any, template: str, chat: Chat, where: str, options: dict[str, bool]
) -> tuple[str, list[Any]]:
    """The text of a conversation and its {% generation %} blocks, if they are asked for."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, blocks = render_jinja_template(
            conversations=[chat.messages],
            tools=chat.tools,
            chat_template=template,
            **options,
            **{**tokenizer.special_tokens_map, **(chat.kwargs or {})},
        )
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where}: the chat template refuses this conversation: {error}") from error
    return texts[0], blocks[0] if options.get("return_assistant_tokens_mask") else []


def _turns(
    write: Callable[[list[dict[str, Any]], bool], str],
    messages: list[dict[str, Any]],
    text: str,
    where: str,
) -> list[tuple[int, int]]:
    """Where the assistant's turns stand in `text`, without marks in the template.

    The assistant's words are what follows the header that asks for them: text that the policy would
    write itself when sampled from there. They end where the turn does, without white space after
    it. That holds only if a turn is written alike with and without what comes later, which is
    checked, since templates that drop earlier reasoning (Qwen 3's) do otherwise.
    """
    found = []
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = write(messages[:number], True)
        after = write(messages[: number + 1], False)
        if before == write(messages[:number], False):
            raise TokenizerError(_NO_MARKS.format("it writes no header for an answer to come"))
        if not (after.startswith(before) and text.startswith(after)):
            raise TokenizerError(
                f"{where}: " + _NO_MARKS.format("it writes a turn otherwise when others follow")
            )
        found.append((len(before), len(after.rstrip())))
    return found
