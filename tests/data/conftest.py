"""Tokenizers made on the spot: the kinds of models and pre-tokenizers that people have."""

from __future__ import annotations

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from jrlhf.data.templates import CHATML

CORPUS = [
    "The sky is blue and the grass is green.",
    "What color is the sky? It is blue, of course.",
    "Human: How are you?\n\nAssistant: I am fine, thank you.",
    "system user assistant\nYou are a helpful assistant.",
    "the man went to the market and the woman went to the sea",
    "def main():\n    return 1 + 1",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]


def _finish(backend: Tokenizer, **extra: object) -> PreTrainedTokenizerFast:
    # A control tag that is not flagged special, as "<think>" of Qwen3.
    backend.add_tokens([AddedToken("<think>", special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<unk>", chat_template=CHATML, **extra,
    )  # fmt: skip


def byte_bpe(*, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind; pad is eos, as in SmolLM2. Optionally the post-processor adds BOS or EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    if bos or eos:
        ids = [(t, backend.token_to_id(t)) for t in ("<|endoftext|>", "<|im_end|>")]
        single = "<|endoftext|> " * bos + "$A" + " <|im_end|>" * eos
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return _finish(backend, **({"bos_token": "<|endoftext|>"} if bos else {}))


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """Llama 2's kind: a prefix space at the start, bytes for unknown characters."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIALS + [f"<0x{b:02X}>" for b in range(256)],
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    return _finish(backend)


def unigram() -> PreTrainedTokenizerFast:
    """T5's kind, with a normalizer."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _finish(backend)


def word_level() -> PreTrainedTokenizerFast:
    """Words between spaces, among which the text of a special token is a word as any other."""
    words = dict.fromkeys(SPECIALS + [word for line in CORPUS for word in line.split()])
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIALS)
    return _finish(backend)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_bpe()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return byte_bpe(bos=True)


@pytest.fixture
def fresh_tokenizer() -> PreTrainedTokenizerFast:
    """One that a test may change."""
    return byte_bpe()


@pytest.fixture(scope="session")
def eos_tokenizer() -> PreTrainedTokenizerFast:
    return byte_bpe(bos=True, eos=True)


@pytest.fixture(scope="session", params=[byte_bpe, sentencepiece_bpe, unigram, word_level],
                ids=["bytes", "sentencepiece", "unigram", "words"])  # fmt: skip
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.param()
