"""Tokenizers that llama.cpp's GGUF files carry in their metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jrlhf.errors import ModelError, TokenizerError, suggest
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
_SPACE = "\u2581"


def tokenizer_backend(path: Path) -> tuple[Any, dict[str, Any]]:
    """A GGUF file's tokenizer.

    Returns:
        The `tokenizers.Tokenizer` and what the class around it must know: special tokens,
        chat_template and model_max_length.

    Raises:
        ModelError: the file is damaged.
        TokenizerError: a tokenizer model or pre-tokenizer that is not implemented, or a value of
            another kind than its key wants.
    """
    metadata = GGUFFile(path)
    try:
        return _backend(metadata)
    except TokenizerError:
        raise
    except ModelError as error:  # names the file and the key already
        raise TokenizerError(str(error)) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{path} has metadata that make no tokenizer ({error}); convert it again."
        ) from error


def _backend(metadata: GGUFFile) -> tuple[Any, dict[str, Any]]:
    from tokenizers import AddedToken

    kind = metadata.text("tokenizer.ggml.model")
    if kind not in _MODELS:
        raise TokenizerError(
            f"{metadata.path} has tokenizer model {kind!r}; of GGUF files are implemented:"
            f" {', '.join(_MODELS)}. Give the Hugging Face tokenizer's directory instead."
        )
    words = metadata.texts("tokenizer.ggml.tokens")
    types = metadata.numbers("tokenizer.ggml.token_type", [_NORMAL] * len(words))
    if len(types) != len(words):
        raise TokenizerError(f"{metadata.path} has {len(words)} tokens and types of {len(types)}.")
    tokenizer = _MODELS[kind](metadata, words, types)
    # In the order of their ids, so that none gets a new id.
    for word, token_type in zip(words, types, strict=True):
        if token_type == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False)])
        elif token_type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(word, normalized=False)])
    settings = _settings(metadata, words)
    _add_template(tokenizer, metadata, settings)
    return tokenizer, settings


def _byte_level(metadata: GGUFFile, words: list[str], types: list[float]) -> Any:
    """Byte-level BPE: GPT-2, Llama 3, Qwen, SmolLM."""
    from tokenizers import Tokenizer, decoders, models

    pre, ignore_merges = _pre_tokenizer(metadata)
    vocab = {word: i for i, word in enumerate(words)}
    merges = [_merge(metadata, pair, vocab) for pair in metadata.texts("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merge(metadata: GGUFFile, pair: str, vocab: Mapping[str, int]) -> tuple[str, str]:
    first, _, second = pair.partition(" ")
    absent = [word for word in (first, second, first + second) if word not in vocab]
    if absent:
        raise TokenizerError(
            f"{metadata.path} has the merge {pair!r} in tokenizer.ggml.merges, expected two tokens"
            f" with a space between them; no token: {', '.join(map(repr, absent))}."
        )
    return first, second


def _sentencepiece(metadata: GGUFFile, words: list[str], types: list[float]) -> Any:
    """sentencepiece's BPE, with bytes for what is not in the vocabulary: Llama 1 and 2, Gemma.

    It joins the two neighbours whose union has the best score. Such a file has scores and no
    merges, so every way to halve a token is one, in the order of the scores.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.numbers("tokenizer.ggml.scores")
    if len(scores) != len(words):
        raise TokenizerError(f"{metadata.path} has {len(words)} tokens and {len(scores)} scores.")
    vocab = {word: i for i, word in enumerate(words)}
    joined = {i for i, kind in enumerate(types) if kind in (_NORMAL, _USER_DEFINED)}
    known = {words[i] for i in joined}
    merges = [
        (words[i][:cut], words[i][cut:])
        for i in sorted(joined, key=lambda i: -scores[i])
        for cut in range(1, len(words[i]))
        if words[i][:cut] in known and words[i][cut:] in known
    ]
    # llama.cpp's is the first, too, where the file names none of its vocabulary.
    unknown = words[metadata.token_id("unknown", len(words)) or 0]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
    back: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(_SPACE))
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


# tokenizer.ggml.model -> what makes the tokenizer
_MODELS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _pre_tokenizer(metadata: GGUFFile) -> tuple[Any, bool]:
    from tokenizers import Regex, pre_tokenizers

    name = metadata.text("tokenizer.ggml.pre", "gpt-2")
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
        token_id = metadata.token_id(name, len(words))
        if token_id is not None:
            settings[f"{role}_token"] = words[token_id]
    arch = metadata.text("general.architecture")
    if length := metadata.integer(f"{arch}.context_length", 0, least=0):
        settings["model_max_length"] = length
    if template := metadata.text("tokenizer.chat_template", ""):
        settings["chat_template"] = template
    return settings


def _add_template(tokenizer: Any, metadata: GGUFFile, settings: Mapping[str, Any]) -> None:
    """Makes the tokenizer add BOS and EOS where the file says so."""
    from tokenizers import processors

    # llama.cpp adds BOS for these even when the file is silent.
    by_default = metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    by_default = by_default or metadata.get("tokenizer.ggml.model") == "llama"
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
