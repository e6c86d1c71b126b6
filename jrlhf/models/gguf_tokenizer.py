"""Tokenizers that llama.cpp's GGUF files carry in their metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jrlhf.errors import TokenizerError, suggest
from jrlhf.models.gguf_file import GGUFFile

# tokenizer.ggml.pre -> (regular expression that splits before the bytes, or None; digits one by
# one; whether whole words of the vocabulary skip the merges). llama.cpp: src/llama-vocab.cpp.
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS: dict[str, tuple[str | None, bool, bool]] = {
    "gpt-2": (None, False, False),
    "smollm": (None, True, False),
    "starcoder": (None, True, False),
    "llama-bpe": (_GPT4 % "{1,3}", False, True),
    "qwen2": (_GPT4 % "", False, False),
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def tokenizer_backend(path: Path) -> tuple[Any, dict[str, Any]]:
    """A GGUF file's tokenizer.

    Returns:
        The `tokenizers.Tokenizer` and what the class around it must know: special tokens,
        chat_template and model_max_length.

    Raises:
        TokenizerError: a tokenizer model or pre-tokenizer that is not implemented.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    metadata = GGUFFile(path)
    kind = metadata.need("tokenizer.ggml.model")
    if kind != "gpt2":
        raise TokenizerError(
            f"{path} has tokenizer model {kind!r}; of GGUF files, byte-level BPE (gpt2) is"
            " implemented. Give the Hugging Face tokenizer's directory instead."
        )
    pre, ignore_merges = _pre_tokenizer(metadata)
    words: list[str] = metadata.need("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ", 1)) for pair in metadata.need("tokenizer.ggml.merges")]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(words))
    # In the order of their ids, so that none gets a new id.
    for word, token_type in zip(words, types, strict=True):
        if token_type == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False)])
        elif token_type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(word, normalized=False)])
    settings = _settings(metadata, words)
    _add_template(tokenizer, metadata, settings)
    return tokenizer, settings


def _pre_tokenizer(metadata: GGUFFile) -> tuple[Any, bool]:
    from tokenizers import Regex, pre_tokenizers

    name = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if name not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"{metadata.path} has pre-tokenizer {name!r}; known: {', '.join(_PRE_TOKENIZERS)}."
            + suggest(name, _PRE_TOKENIZERS)
        )
    pattern, digits, ignore_merges = _PRE_TOKENIZERS[name]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    return pre_tokenizers.Sequence(steps), ignore_merges


def _settings(metadata: GGUFFile, words: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for name, role in roles.items():
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None and token_id < len(words):
            settings[f"{role}_token"] = words[token_id]
    arch = metadata.need("general.architecture")
    if length := metadata.get(f"{arch}.context_length"):
        settings["model_max_length"] = int(length)
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return settings


def _add_template(tokenizer: Any, metadata: GGUFFile, settings: Mapping[str, Any]) -> None:
    """Makes the tokenizer add BOS and EOS where the file says so."""
    from tokenizers import processors

    # llama.cpp adds BOS for llama-bpe even when the file is silent.
    by_default = metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    before = metadata.get("tokenizer.ggml.add_bos_token", by_default) and settings.get("bos_token")
    after = metadata.get("tokenizer.ggml.add_eos_token", False) and settings.get("eos_token")
    if not before and not after:
        return
    special = [token for token in (before, after) if token]
    parts = [part for part in (before, "$A", after) if part]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(parts),
        pair=None,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in special],
    )
