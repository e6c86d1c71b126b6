"""Turns what a user names (a path or an id on the Hugging Face hub) into a local path."""

from __future__ import annotations

import re
from pathlib import Path

from jrlhf.errors import MissingFileError, UnsupportedModelError

_TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
_WEIGHT_FILES = ["*.safetensors"]
# Copies of the same weights in other layouts that some repositories carry.
_IGNORED = ["onnx/*", "original/*", "consolidated*", "runs/*", "checkpoint-*/*"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(name_or_path: str | Path, *, weights: bool = True) -> Path:
    """Finds a model's files, downloading them from the hub when it is no local path.

    `HF_HUB_OFFLINE`, `HF_HOME`, `HF_TOKEN` and `HF_ENDPOINT` act as everywhere.

    Args:
        name_or_path: a directory, a .gguf or .npz file, or a hub id such as "org/model".
        weights: False fetches the tokenizer and configs only.

    Raises:
        MissingFileError: it is neither on this machine nor to be had from the hub.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = str(name_or_path)
    looks_local = name.startswith((".", "~", "/")) or path.suffix in (".gguf", ".npz")
    if looks_local or not _HUB_ID.fullmatch(name):
        raise MissingFileError(f"{name} does not exist (seen from {Path.cwd()}).")
    return _download(name, weights=weights)


def _download(name: str, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = _TOKENIZER_FILES + (_WEIGHT_FILES if weights else [])
    try:
        found = snapshot_download(
            name, allow_patterns=wanted, ignore_patterns=_IGNORED, etag_timeout=10
        )
    except Exception as error:  # the client raises its own, httpx's and OSError's families
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise MissingFileError(
            f'"{name}" is no local path and could not be had from the Hugging Face hub: {reason}\n'
            "  Fix: check the spelling and HF_TOKEN, or give a local directory or .gguf file."
            " `python scripts/assets.py smollm2` fetches a small model without the hub."
        ) from error
    return Path(found)


def kind_of(path: Path) -> tuple[str, Path]:
    """What lies at a local path: ("hf", directory), ("gguf", file) or ("glassllm", npz file).

    Raises:
        MissingFileError: a directory without a model, or with several.
        UnsupportedModelError: a file of an unknown kind.
    """
    if path.suffix == ".gguf" and path.is_file():
        return "gguf", path
    if path.suffix == ".npz" and path.is_file():
        return "glassllm", path
    if not path.is_dir():
        raise UnsupportedModelError(
            f"{path} is neither a model directory nor a .gguf file."
            " For safetensors, give the directory that also holds config.json."
        )
    if any((path / name).is_file() for name in ("config.json", "tokenizer.json")):
        return "hf", path
    files = [("gguf", file) for file in sorted(path.glob("*.gguf"))]
    files += [
        ("glassllm", file)
        for file in sorted(path.glob("*.npz"))
        if file.with_suffix(".tokenizer.json").is_file()
    ]
    if len(files) > 1:
        names = ", ".join(file.name for _, file in files)
        raise MissingFileError(f"{path} holds several models ({names}); name one of the files.")
    return files[0] if files else ("hf", path)
