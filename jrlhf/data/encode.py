"""Text and conversations to token ids, in batches; user text cannot write special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jrlhf.data.guard import Guard, Span
from jrlhf.data.templates import Chat, Rendered, render, template_of
from jrlhf.errors import TokenizerError

Ids = np.ndarray


class Encoder:
    """A tokenizer as the data pipeline uses it.

    Attributes:
        guarded: how many texts held the text of a special token that was encoded as ordinary text.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        parse_special_tokens: bool = False,
    ) -> None:
        """Wraps a tokenizer.

        Args:
            tokenizer: a transformers tokenizer.
            chat_template: used in place of the tokenizer's own.
            parse_special_tokens: True trusts the data: special-token text in strings becomes
                special tokens, as in TRL. For text that was rendered before; off by default.
        """
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.parse_special_tokens = parse_special_tokens
        self.guarded = 0
        self._text_guard = Guard(tokenizer)
        self._chat_guard: Guard | None = None

    def texts(self, texts: Sequence[str], *, eos: bool = False) -> list[Ids]:
        """Encodes plain strings as the tokenizer does by default (BOS where it adds one).

        Args:
            texts: strings.
            eos: end each with the EOS token exactly once, whether or not its text is there already.
        """
        token, eos_id = self.tokenizer.eos_token, self.tokenizer.eos_token_id
        if eos and token is None:
            raise TokenizerError("The tokenizer has no EOS token to end texts with: set eos_token.")
        if eos:
            texts = [text.removesuffix(token) for text in texts]
        if self.parse_special_tokens:
            encoded = [ids for ids, _ in self._plain(texts, add_special_tokens=True)]
            encoded = [self._one_bos(ids) for ids in encoded]
        else:
            guard = self._text_guard
            hits = [guard.found(text) for text in texts]
            texts = [guard.strip(t) if hit else t for t, hit in zip(texts, hits, strict=True)]
            encoded = self._mixed(guard, texts, hits, add_special_tokens=True)[0]
        if eos:
            # A tokenizer whose post-processor adds EOS itself must not get a second one.
            encoded = [ids if ids and ids[-1] == eos_id else [*ids, eos_id] for ids in encoded]
        return [np.asarray(ids, np.int32) for ids in encoded]

    def chats(
        self,
        chats: Sequence[Chat],
        *,
        add_generation_prompt: Sequence[bool] | None = None,
        continue_final_message: Sequence[bool] | None = None,
        where: Sequence[str] | None = None,
    ) -> list[Ids]:
        """Renders and encodes conversations; the template writes BOS, nothing is added to it."""
        ids, _ = self._chats(chats, add_generation_prompt, continue_final_message, False, where)
        return [np.asarray(row, np.int32) for row in ids]

    def assistant_chats(
        self, chats: Sequence[Chat], *, where: Sequence[str] | None = None
    ) -> list[tuple[Ids, np.ndarray]]:
        """Encodes conversations together with a 0/1 mask of the tokens that the assistant wrote.

        Raises:
            TokenizerError: the template does not tell which they are; see `templates.render`.
        """
        ids, masks = self._chats(chats, None, None, True, where)
        return [
            (np.asarray(row, np.int32), mask) for row, mask in zip(ids, masks or [], strict=True)
        ]

    def _chats(
        self,
        chats: Sequence[Chat],
        header: Sequence[bool] | None,
        continuing: Sequence[bool] | None,
        spans: bool,
        where: Sequence[str] | None,
    ) -> tuple[list[list[int]], list[np.ndarray] | None]:
        rendered: list[Rendered] = []
        hits: list[bool] = []
        guard = self._guard_of_chats(chats)
        for number, chat in enumerate(chats):
            hit = False
            if not self.parse_special_tokens:
                chat, hit = guard.mark_chat(chat)
            result = render(
                self.tokenizer,
                chat,
                chat_template=self.chat_template,
                add_generation_prompt=bool(header and header[number]),
                continue_final_message=bool(continuing and continuing[number]),
                spans=spans,
                where=where[number] if where else f"row {number}",
            )
            if hit:
                result = Rendered(*guard.resolve(result.text, result.spans))
            rendered.append(result)
            hits.append(hit)
        texts = [result.text for result in rendered]
        ids, offsets = self._mixed(guard, texts, hits, add_special_tokens=False, offsets=spans)
        if not spans:
            return ids, None
        blocks = [result.spans for result in rendered]
        return ids, [_span_mask(o, block) for o, block in zip(offsets, blocks, strict=True)]

    def _guard_of_chats(self, chats: Sequence[Chat]) -> Guard:
        if self._chat_guard is None:
            tools = chats[0].tools if chats else None
            template = template_of(self.tokenizer, self.chat_template, tools)
            self._chat_guard = Guard(self.tokenizer, template)
        return self._chat_guard

    def _mixed(
        self,
        guard: Guard,
        texts: Sequence[str],
        hits: Sequence[bool],
        *,
        add_special_tokens: bool,
        offsets: bool = False,
    ) -> tuple[list[list[int]], list[list[Span]]]:
        """Encodes texts, those with hits by the guard's twin: ids and character offsets."""
        plain = [text for text, hit in zip(texts, hits, strict=True) if not hit]
        risky = [text for text, hit in zip(texts, hits, strict=True) if hit]
        self.guarded += len(risky)
        normal = iter(self._plain(plain, add_special_tokens=add_special_tokens, offsets=offsets))
        twin = iter(guard.encode(risky, add_special_tokens=add_special_tokens))
        encoded = [next(twin) if hit else next(normal) for hit in hits]
        return [ids for ids, _ in encoded], [where for _, where in encoded]

    def _plain(
        self, texts: Sequence[str], *, add_special_tokens: bool, offsets: bool = False
    ) -> list[tuple[list[int], list[Span]]]:
        if not texts:
            return []
        if offsets and not getattr(self.tokenizer, "is_fast", False):
            raise TokenizerError("assistant_only_loss=True needs a fast tokenizer.")
        out = self.tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )
        places = out["offset_mapping"] if offsets else [[] for _ in texts]
        return list(zip(out["input_ids"], places, strict=True))

    def _one_bos(self, ids: list[int]) -> list[int]:
        # Text that was rendered with its BOS gets a second one from the tokenizer.
        bos = self.tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def as_encoder(tokenizer: Any) -> Encoder:
    """The encoder itself, or one with default options around a tokenizer."""
    return tokenizer if isinstance(tokenizer, Encoder) else Encoder(tokenizer)


def _span_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """1 for every token that overlaps one of the character spans."""
    mask = np.zeros(len(offsets), np.uint8)
    if offsets and spans:
        starts, ends = np.asarray(offsets).T
        for start, end in spans:
            mask |= ((ends > start) & (starts < end)).astype(np.uint8)
    return mask
