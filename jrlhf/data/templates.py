"""Chat templates: rendering conversations to text, with the spans that the assistant wrote."""

from __future__ import annotations

import re
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

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Chat(NamedTuple):
    """One conversation and what its template may read besides the messages."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    kwargs: dict[str, Any] | None = None


class Rendered(NamedTuple):
    """A conversation as text, with the character spans inside {% generation %} blocks."""

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


def require_generation(template: str) -> None:
    """Raises TokenizerError unless the template marks what the assistant wrote."""
    if not _GENERATION.search(template):
        raise TokenizerError(
            "assistant_only_loss=True needs a chat template that marks the assistant's turns with "
            "{% generation %} … {% endgeneration %}; this one does not. Add them, or use a "
            "prompt-completion dataset with completion_only_loss."
        )


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
        spans: also report the {% generation %} blocks.
        where: row named by errors.
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = chat.tools or None  # Llama's template prints tool boilerplate for an empty list
    template = template_of(tokenizer, chat_template, tools)
    try:
        texts, blocks = render_jinja_template(
            conversations=[chat.messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=spans,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **{**tokenizer.special_tokens_map, **(chat.kwargs or {})},
        )
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where}: the chat template refuses this conversation: {error}") from error
    return Rendered(texts[0], [tuple(block) for block in blocks[0]] if spans else [])
