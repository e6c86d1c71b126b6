"""The Hugging Face hub: what a user names (a path or an id) as a local path, and uploads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from jrlhf.config import HUB_ID
from jrlhf.errors import (
    ConfigError,
    HubError,
    MissingFileError,
    ModelError,
    UnsupportedModelError,
)
from jrlhf.models.hf.reader import INDEX, SINGLE

_TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
_WEIGHT_FILES = ["*.safetensors"]
# Copies of the same weights in other layouts that some repositories carry.
_IGNORED = ["onnx/*", "original/*", "consolidated*", "runs/*", "checkpoint-*/*"]
# Ours alone (`tokenizer_files`), and no part of a model.
TOKENIZER_RECORD = ".tokenizer_of_model.json"
# What an upload leaves out because the model has no more of it, of what it may find on the hub.
_DIGITS = "[0-9]" * 5
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_REPLACED_BY_WEIGHTS = [
    SINGLE, INDEX, f"model-{_DIGITS}-of-{_DIGITS}.safetensors", "generation_config.json",
    *ADAPTER,
]  # fmt: skip
# A tokenizer takes them up, whoever's they are.
_REPLACED_BY_TOKENIZER = [
    "chat_template.jinja", "additional_chat_templates/*.jinja",
    "special_tokens_map.json", "added_tokens.json",
]  # fmt: skip


def resolve(name_or_path: str | Path, *, weights: bool = True, revision: str | None = None) -> Path:
    """Finds a model's files, downloading them from the hub when it is no local path.

    `HF_HUB_OFFLINE`, `HF_HOME`, `HF_TOKEN` and `HF_ENDPOINT` act as everywhere.

    Args:
        name_or_path: a directory, a .gguf or .npz file, or a hub id such as "org/model".
        weights: False fetches the tokenizer and configs only.
        revision: a branch, tag or commit on the hub; None: its main branch.

    Raises:
        ConfigError: neither text nor a path, or a revision of what lies on this machine.
        ModelError: a name that no file can have.
        MissingFileError: it is neither on this machine nor to be had from the hub.
    """
    if not isinstance(name_or_path, str | Path):
        raise ConfigError(
            f"A model is named by a path or a hub id, got {name_or_path!r}"
            f" ({type(name_or_path).__name__})."
        )
    try:
        path = Path(name_or_path).expanduser()
        found = path.exists()
    except (OSError, RuntimeError) as error:  # too long, or the home of nobody
        raise ModelError(f"No model has the name {_short(name_or_path)}: {_why(error)}.") from error
    if found:
        if revision not in (None, "main"):
            raise ConfigError(f"revision={revision!r}: {path} lies here, and has no revisions.")
        return path
    name = str(name_or_path)
    looks_local = name.startswith((".", "~", "/")) or path.suffix in (".gguf", ".npz")
    if looks_local or not HUB_ID.fullmatch(name):
        raise MissingFileError(f"{name} does not exist (seen from {Path.cwd()}).")
    return _download(name, weights=weights, revision=revision)


def target(directory: str | os.PathLike[str]) -> Path:
    """Where a model is to be written: a directory, there already or not.

    Raises:
        ConfigError: no path, a file, below a file, or a name that no directory can have.
    """
    if not isinstance(directory, str | os.PathLike):
        raise ConfigError(
            f"A model is saved into a directory, got {directory!r} ({type(directory).__name__})."
        )
    try:
        path = Path(directory).expanduser()
        # What is there of the path: itself, or the nearest of its parents.
        there = next((p for p in (path, *path.parents) if p.exists()), None)
    except (OSError, RuntimeError) as error:  # too long, or the home of nobody
        raise ConfigError(f"No directory is {_short(directory)}: {_why(error)}.") from error
    if there is not None and not there.is_dir():
        raise ConfigError(
            f"A model is saved into a directory, and {there} is a file: name another directory."
        )
    return path


def _short(name: object) -> str:
    text = str(name)
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}… ({len(text)} characters)"


def _why(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")


def _download(name: str, *, weights: bool, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = _TOKENIZER_FILES + (_WEIGHT_FILES if weights else [])
    try:
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=_IGNORED,
            etag_timeout=10,
        )
    except Exception as error:  # the client raises its own, httpx's and OSError's families
        raise MissingFileError(
            f'"{name}" is no local path and could not be had from the Hugging Face hub: '
            f"{_first_line(error)}\n"
            "  Fix: check the spelling and HF_TOKEN, or give a local directory or .gguf file."
            " `python scripts/assets.py smollm2` fetches a small model without the hub."
        ) from error
    return Path(found)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


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


def check_id(repo_id: object) -> str:
    """The id of a repository, "name" or "org/name".

    Raises:
        ConfigError: it cannot be one.
    """
    if not isinstance(repo_id, str) or not HUB_ID.fullmatch(repo_id):
        raise ConfigError(f'{repo_id!r} is no id on the hub: write "name" or "organisation/name".')
    return repo_id


def create(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Makes a model repository, unless it is there, and returns its full id.

    Args:
        repo_id: "name" (of the token's owner) or "organisation/name".
        token: with the right to write; None: HF_TOKEN, or the one of `hf auth login`.
        private: whether only its owners see it; None: as the organisation has it. Means nothing
            for one that is there already.

    Raises:
        ConfigError: no such id can be.
        HubError: the hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi

    check_id(repo_id)
    with _asking(repo_id):
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def upload(
    directory: Path,
    repo_id: str,
    *,
    message: str,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a directory, to a repository that is made if absent.

    What an earlier upload left there, and would be loaded in place of this one's, is deleted: old
    shards, an old chat template. Anything else stays.

    Args:
        directory: every file of it is sent.
        repo_id, token, private: as in `create`.
        message: of the commit.
        revision: a branch, made if absent; None: main.
        create_pr: opens a pull request instead of committing.

    Returns:
        The commit's URL.

    Raises:
        ConfigError, HubError: as `create`.
    """
    from huggingface_hub import HfApi

    full = create(repo_id, token=token, private=private)
    api = HfApi(token=token)
    with _asking(full):
        if revision is not None and not create_pr:
            api.create_branch(full, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=full,
            folder_path=str(directory),
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=_replaced(directory) or None,
            ignore_patterns=[TOKENIZER_RECORD],
        )
    return str(done.pr_url if create_pr else done.commit_url)


def _replaced(directory: Path) -> list[str]:
    """What else on the hub a directory stands for; the client keeps what is sent anew."""
    patterns: list[str] = []
    if any((directory / name).is_file() for name in (SINGLE, INDEX)):
        patterns += _REPLACED_BY_WEIGHTS
    if any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        patterns += _REPLACED_BY_TOKENIZER
    return patterns


@contextlib.contextmanager
def _asking(repo_id: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the client raises its own, httpx's and OSError's families
        raise HubError(
            f'The Hugging Face hub did not take "{repo_id}": {_first_line(error)}\n'
            "  Fix: give a token that may write there (hub_token, HF_TOKEN or `hf auth login`), and"
            " unset HF_HUB_OFFLINE. A saved model is still on this machine."
        ) from error
