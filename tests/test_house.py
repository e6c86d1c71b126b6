"""The house keeps its shape: layers, size budgets, safety, start-up time."""

from __future__ import annotations

import ast
import io
import os
import re
import resource
import subprocess
import sys
import time
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jrlhf"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# A file over budget may argue for itself: its first comment starts with this word.
ARGUED = "# Over budget:"
FILE, FUNCTION = 400, 60
BUDGETS = {"trainers": 150, "algos": 200, "commands": 120, "families": 119}
DEFINITIONS = (ast.ClassDef, ast.FunctionDef)
# Importing these, or calling those, would run what a stranger's file says.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FOREIGN_MODULES = {"torch", "tensorflow", "trl", "peft", "accelerate"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_METHODS = {
    ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("yaml", "load_all"),
    ("os", "system"), ("os", "popen"),
}  # fmt: skip


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def argued(path: Path) -> bool:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    first = next((t.string for t in tokens if t.type == tokenize.COMMENT), "")
    return first.startswith(ARGUED)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def budget(path: Path) -> int:
    """Algorithms, faces (they define a SomethingTrainer), verbs (a main) and model families (they
    write a config) have their own."""
    room = path.relative_to(PACKAGE).parts[0]
    if path.parent.name == "families":
        room = "families"
    if room not in BUDGETS or path.name == "__init__.py":
        return FILE
    names = {node.name for node in parse(path).body if isinstance(node, DEFINITIONS)}
    small = {
        "algos": True,
        "trainers": any(re.fullmatch(r"\w+Trainer", name) for name in names),
        "commands": "main" in names,
        "families": "write" in names,
    }
    return BUDGETS[room] if small[room] else FILE


def test_every_file_stays_within_its_budget() -> None:
    over = []
    for path in [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = budget(path) if PACKAGE in path.parents else FILE
        if lines > limit and not argued(path):
            over.append(f"{name_of(path)}: {lines} lines, {limit} allowed")
    assert not over, "\n".join(over)


def test_every_function_stays_within_its_budget() -> None:
    over = [
        f"{name_of(path)}:{node.lineno} {node.name}: {length} lines, {FUNCTION} allowed"
        for path in SOURCES
        if not argued(path)
        for node in functions(parse(path))
        if (length := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION
    ]
    assert not over, "\n".join(over)


def test_no_file_is_called_utils() -> None:
    assert not [name_of(path) for path in SOURCES if re.search(r"utils?|helpers?", path.stem)]


def unsafe(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and reason of everything that may run or load what it should not."""
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        for module in modules:
            if module.split(".")[0] in UNSAFE_MODULES | FOREIGN_MODULES:
                yield node.lineno, f"imports {module}"
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in UNSAFE_CALLS:
            yield node.lineno, f"calls {called.id}"
        elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            pair = (called.value.id, called.attr)
            if pair in UNSAFE_METHODS:
                yield node.lineno, f"calls {'.'.join(pair)}"
        for keyword in node.keywords:
            value = keyword.value
            on = not (isinstance(value, ast.Constant) and value.value is False)
            if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and on:
                yield node.lineno, f"passes {keyword.arg}"


def test_no_source_loads_pickles_runs_text_or_needs_torch() -> None:
    found = [f"{name_of(p)}:{line} {why}" for p in SOURCES for line, why in unsafe(parse(p))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from torch import nn",
        "import tensorflow.io as t",
        "eval('1')",
        "yaml.load(text)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run('ls', shell=True)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=flag)",
    ],
)
def test_the_safety_check_sees(source: str) -> None:
    assert list(unsafe(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    ["yaml.safe_load(text)", "model.eval", "np.load(path, allow_pickle=False)", "re.compile(x)"],
)
def test_the_safety_check_lets_pass(source: str) -> None:
    assert not list(unsafe(ast.parse(source)))


# Called by users alone.
FOR_USERS = {"delete_adapter", "print_trainable_parameters"}


def test_every_name_is_used() -> None:
    """What only tests call is deleted."""
    files = [p for room in ("jrlhf", "scripts", "benchmarks") for p in (ROOT / room).rglob("*.py")]
    words = Counter(w for p in files for w in re.findall(r"\w+", p.read_text(encoding="utf-8")))
    defined = {
        node.name
        for path in SOURCES
        for node in ast.walk(parse(path))
        if isinstance(node, DEFINITIONS) and not node.name.startswith("__")
    }
    assert {name for name in defined if words[name] == 1} == FOR_USERS


def test_imports_point_down_only() -> None:
    pytest.importorskip("importlinter")
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_room_of_the_house_is_in_the_layer_contract() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = config["tool"]["importlinter"]["contracts"][0]["layers"]
    named = set(re.findall(r"\w+", " ".join(layers)))
    rooms = {
        p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()
    }
    assert rooms - {"__init__", "__main__"} <= named


def clean_environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}


def answers_within(limit: float, command: list[str], *, tries: int = 3) -> bool:
    """Whether the fastest of a few runs stays below the limit, in seconds.

    A machine with more work than cores stretches every clock but a process's own: there the
    processor time counts.
    """
    busy = os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)
    for _ in range(tries):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            command, check=True, cwd=ROOT, env=clean_environment(), stdout=subprocess.DEVNULL
        )
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if (worked if busy else wall) < limit:
            return True
    return False


def test_importing_jrlhf_is_quick() -> None:
    assert answers_within(3.0, [sys.executable, "-c", "import jrlhf"])


def test_importing_jrlhf_and_its_public_names_needs_no_torch() -> None:
    script = (
        "import sys, jrlhf\n"
        "for name in jrlhf.__all__: getattr(jrlhf, name)\n"
        "print(sorted({'torch', 'tensorflow', 'trl'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_help_answers_within_a_second() -> None:
    command = [sys.executable, "-c", "from jrlhf.cli import main; main(['--help'])"]
    assert answers_within(1.0, command)


FORBIDDEN_TEXT = re.compile(r"/root/|/work/|/home/\w+/|pyenv/versions")


def test_no_file_names_a_place_on_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path == Path(__file__) or not path.is_file() or path.suffix in (".png", ".gz"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{name}: {match[0]}" for match in FORBIDDEN_TEXT.finditer(text)]
    assert not found, "\n".join(found)
