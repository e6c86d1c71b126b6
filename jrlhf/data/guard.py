"""Keeps the text of special tokens in user data from becoming special tokens.

Tokenizers find special tokens by their text, so a dataset string that holds "<|im_end|>" could
close a turn, and with it move the loss mask. Rows without such strings (nearly all) take the
tokenizer's own path. For the others a twin of the tokenizer is made whose special tokens have
unwritable names: the template's own tokens are renamed to those, user text stays as it is, and
everything else about the encoding (normalizer, merges across pieces, offsets) is the tokenizer's.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

from jrlhf.data.templates import Chat
from jrlhf.errors import TokenizerError

# Code points of a private plane that no text uses. In rows that need the guard they are removed
# from user text first, so that nobody can write a name or a mark.
OPEN, CLOSE, NAME = "\U0010ff00", "\U0010ff01", "\U0010ff02"
_RESERVED = {ord(mark): None for mark in (OPEN, CLOSE, NAME)}

_BYTE = re.compile("<0x[0-9A-F]{2}>")

Span = tuple[int, int]


class Guard:
    """Finds and neutralises the text of a tokenizer's special tokens.

    Tokens flagged special are guarded everywhere. Added tokens without the flag that the chat
    template writes (DeepSeek's "<｜User｜>", but also Qwen's "<think>") are guarded everywhere but
    in assistant messages, where reasoning and tool-call tags are meant to be tokens.
    """

    def __init__(self, tokenizer: Any, chat_template: str = "") -> None:
        self.tokenizer = tokenizer
        # Byte tokens are flagged special in some files; renamed, bytes would become unknown.
        added = {
            token.content: (id_, token.special)
            for id_, token in tokenizer.added_tokens_decoder.items()
            if not _BYTE.fullmatch(token.content) and not token.content.isspace()
        }
        special = {content: id_ for content, (id_, flag) in added.items() if flag}
        written = {content: id_ for content, (id_, _) in added.items() if content in chat_template}
        self.ids = {**special, **written}
        names = _alternatives(self.ids)
        self.special = re.compile(_alternatives(special))
        self.control = re.compile(names)
        self._resolve = re.compile(f"{OPEN}({names}){CLOSE}|([{OPEN}{CLOSE}])|({names})")
        self._twin: Any = None

    def found(self, text: str) -> bool:
        return self.special.search(text) is not None

    def mark_chat(self, chat: Chat) -> tuple[Chat, bool]:
        """Marks control-token text in all that the user supplied; also says if there was any."""
        messages, hits = [], []
        for message in chat.messages:
            own = message.get("role") == "assistant"
            marked, hit = self._mark(message, self.special if own else self.control)
            messages.append(marked)
            hits.append(hit)
        (tools, kwargs), hit = self._mark((chat.tools, chat.kwargs), self.control)
        return (Chat(messages, tools, kwargs), True) if any(hits) or hit else (chat, False)

    @staticmethod
    def _mark(value: Any, pattern: re.Pattern[str]) -> tuple[Any, bool]:
        """Wraps matches in all strings of a JSON-like value, dict keys excepted."""
        hit = False

        def visit(item: Any) -> Any:
            nonlocal hit
            if isinstance(item, str):
                clean = item.translate(_RESERVED)
                marked, count = pattern.subn(f"{OPEN}\\g<0>{CLOSE}", clean)
                hit = hit or count > 0
                return marked
            if isinstance(item, dict):
                return {key: visit(entry) for key, entry in item.items()}
            if isinstance(item, (list, tuple)):
                return [visit(entry) for entry in item]
            return item

        return visit(value), hit

    def resolve(self, rendered: str, spans: Sequence[Span]) -> tuple[str, list[Span]]:
        """Rewrites a template's output for the twin: its tokens renamed, the user's text unmarked.

        Args:
            rendered: what the template made of marked messages.
            spans: character spans of it to carry over.
        """
        pieces: list[str] = []
        old, new = [0], [0]  # matching positions of the two strings, at every change
        at = length = 0
        for match in self._resolve.finditer(rendered):
            kept = rendered[at : match.start()]
            user, _, own = match.groups()
            written = user or (f"{NAME}{self.ids[own]}{NAME}" if own else "")
            pieces += [kept, written]
            old += [match.start(), match.end()]
            new += [length + len(kept), length + len(kept) + len(written)]
            length, at = new[-1], match.end()
        pieces.append(rendered[at:])

        def moved(position: int) -> int:
            where = bisect_right(old, position) - 1
            return new[where] + position - old[where]

        return "".join(pieces), [(moved(start), moved(end)) for start, end in spans]

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[tuple[list, list]]:
        """Encodes with the twin: (ids, character offsets) of each text."""
        if not texts:
            return []
        if self._twin is None:
            self._twin = self._make_twin()
        encoded = self._twin.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [(encoding.ids, encoding.offsets) for encoding in encoded]

    def strip(self, text: str) -> str:
        """Plain text as the twin may read it."""
        return text.translate(_RESERVED)

    def _make_twin(self) -> Any:
        from tokenizers import Tokenizer

        if not getattr(self.tokenizer, "is_fast", False):
            raise TokenizerError(
                "The data holds the text of special tokens, which only a fast tokenizer can encode "
                "as ordinary text: load this tokenizer with a tokenizer.json."
            )
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        names = {content: f"{NAME}{id_}{NAME}" for content, id_ in self.ids.items()}
        for token in state["added_tokens"]:
            if token["content"] in names:
                token.update(content=names[token["content"]], normalized=False)
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): id_ for piece, id_ in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        try:
            twin = Tokenizer.from_str(json.dumps(state))
        except Exception as error:
            raise TokenizerError(f"This tokenizer cannot be guarded: {error}") from error
        wrong = [c for c, name in names.items() if twin.token_to_id(name) != self.ids[c]]
        if wrong:
            raise TokenizerError(f"This tokenizer cannot be guarded: ids of {wrong} would change.")
        twin.no_truncation()
        twin.no_padding()
        return twin


def _alternatives(tokens: Iterable[str]) -> str:
    # Longest first, so that a token wins over the tokens that it contains.
    return "|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or "(?!)"
