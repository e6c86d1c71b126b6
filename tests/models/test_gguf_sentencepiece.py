"""sentencepiece's BPE from a GGUF file, against the algorithm written out by hand."""

from __future__ import annotations

import gguf
import pytest

from jrlhf.errors import TokenizerError
from jrlhf.models.tokenizer import load_tokenizer
from jrlhf.models.tokenizer_files import save_tokenizer
from tests.models.gguf_cases import add_metadata
from tests.models.plain import encode_text

SPACE = "\u2581"
PIECES = {
    f"{SPACE}t": -1.0, "he": -2.0, f"{SPACE}the": -3.0, "in": -4.0, f"{SPACE}a": -5.0,
    "the": -6.0, "er": -7.0, "re": -8.0, f"{SPACE}there": -9.0, "here": -9.5, "nn": -10.0,
    "\n\n": -11.0, f"{SPACE}{SPACE}": -12.0, "12": -13.0, "23": -13.0, "123": -14.0,
    "inner": -15.0, "h\u00e9": -16.0,
}  # fmt: skip
SINGLE = [SPACE, *"abcdehinrst123.\n\u00e9"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
WORDS = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, *SINGLE, "<turn>"]
SCORES = (
    [0.0] * (3 + 256) + list(PIECES.values()) + [-1000.0 - i for i in range(len(SINGLE))] + [0.0]
)
TYPES = [2, 3, 3, *[6] * 256, *[1] * (len(PIECES) + len(SINGLE)), 4]
TEXTS = [
    "", "the", " the", "there in here", "inner", "a  b", "  ", "123123", "12323", "\n\n\n",
    "h\u00e9llo \u4e16 \U0001f389", "reed</s>the", "in<turn>the", "atherer innn",
]  # fmt: skip


def write(path, *, prefix=None, scores=SCORES, kind="llama", metadata=None):
    writer = gguf.GGUFWriter(str(path), "gemma3")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(WORDS)
    writer.add_token_scores(scores)
    writer.add_token_types(TYPES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if prefix is not None:
        writer.add_add_space_prefix(prefix)
    add_metadata(writer, metadata or {})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def encode_by_hand(text, *, prefix=True):
    """llama.cpp's llm_tokenizer_spm: join the neighbours of the best score until none is left."""
    vocab = {word: i for i, word in enumerate(WORDS)}
    ids = []
    for number, part in enumerate(text.split("<turn>")):
        ids += [vocab["<turn>"]] if number else []
        if not part:
            continue
        symbols = list((SPACE if prefix else "") + part.replace(" ", SPACE))
        while True:
            pairs = ["".join(symbols[i : i + 2]) for i in range(len(symbols) - 1)]
            found = [(-SCORES[vocab[p]], i) for i, p in enumerate(pairs) if p in PIECES]
            if not found:
                break
            at = min(found)[1]
            symbols[at : at + 2] = [pairs[at]]
        for symbol in symbols:
            bytes_of = [vocab[f"<0x{byte:02X}>"] for byte in symbol.encode()]
            ids += [vocab[symbol]] if symbol in vocab else bytes_of
    return ids


@pytest.mark.parametrize("prefix", [None, True, False])
def test_tokens_are_those_of_the_algorithm_by_hand(tmp_path, prefix):
    tokenizer = load_tokenizer(write(tmp_path / "t.gguf", prefix=prefix))
    for text in TEXTS:
        ids = encode_text(tokenizer, text)
        assert ids == encode_by_hand(text, prefix=prefix is not False), text
        if "<turn>" not in text:  # behind which a space is put
            assert tokenizer.decode(ids) == text


def test_bos_is_added_and_the_tokenizer_can_be_saved(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "t.gguf"))
    ids = tokenizer("the")["input_ids"]
    assert ids == [1, *encode_by_hand("the")]
    save_tokenizer(tmp_path, tokenizer=tokenizer, source=None)
    again = load_tokenizer(tmp_path)
    assert again("the")["input_ids"] == ids
    assert again.get_vocab() == tokenizer.get_vocab()


def test_files_that_do_not_fit_are_named_errors(tmp_path):
    with pytest.raises(TokenizerError, match="tokens and 3 scores"):
        load_tokenizer(write(tmp_path / "t.gguf", scores=SCORES[:3]))
    with pytest.raises(TokenizerError, match=r"tokenizer model 't5'; .*gpt2, llama"):
        load_tokenizer(write(tmp_path / "u.gguf", kind="t5"))
