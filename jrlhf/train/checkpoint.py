"""Checkpoints: everything a resume needs, in `output_dir/checkpoint-<step>`.

    state/               parameters, optimizer state and counters (Orbax, one entry per leaf)
    tree.json            path, shape and dtype of each leaf, compared before anything is read
    source-<p>.json/.npz position of the data (or the rollout buffer) of process p
    trainer_state.json   log history and the running sums of the loop
    config.json          the config, its digest and the versions that wrote it

A directory is written under another name and renamed when complete, so `checkpoint-<step>` is whole
or absent.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jrlhf.errors import CheckpointError
from jrlhf.sharding.distributed import barrier, is_main
from jrlhf.train.state import TrainState, abstract

_NAME = re.compile(r"checkpoint-(\d+)")
_LISTED = 8
# Fields that may change between a run and its continuation without changing what is computed.
_HARMLESS = frozenset(
    ("output_dir", "logging_steps", "logging_dir", "report_to", "run_name", "disable_tqdm", "mesh",
     "save_steps", "save_strategy", "save_total_limit", "eval_steps", "eval_strategy",
     "per_device_eval_batch_size", "resume_from_checkpoint", "push_to_hub", "hub_model_id",
     "hub_strategy", "hub_token", "hub_private_repo", "hub_revision")
)  # fmt: skip


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
        state: in the shardings that were asked for.
        source: for `source.load_state_dict`.
        trainer: the dict that was saved as `trainer`.
        changed: names of config fields that differ and matter.
    """

    state: TrainState
    source: dict[str, Any]
    trainer: dict[str, Any]
    changed: list[str]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: the run's `output_dir`.
        total_limit: how many to keep, the newest; None keeps all.
        config: JSON-ready values of the config.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        total_limit: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.total_limit = total_limit
        self.config = json.loads(json.dumps(dict(config or {}), default=str))

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return _steps(self.directory)

    def path(self, step: int) -> Path:
        return self.directory / f"checkpoint-{step}"

    def save(
        self, state: TrainState, *, source: Mapping[str, Any], trainer: Mapping[str, Any]
    ) -> Path:
        """Writes a checkpoint and deletes those over the limit; returns when it is on disk.

        Called by every process. It waits, because the next step donates the arrays being written.
        """
        step = int(state.step)
        final, partial = self.path(step), self.directory / f".checkpoint-{step}.partial"
        if is_main():
            for stale in self.directory.glob(".checkpoint-*.partial"):
                shutil.rmtree(stale)
            partial.mkdir(parents=True)
        barrier(f"checkpoint-{step}-begin")
        _write_state(partial / "state", state)
        _write_source(partial, source)
        if is_main():
            _write_json(partial / "tree.json", _shapes(state))
            _write_json(partial / "trainer_state.json", trainer)
            _write_json(partial / "config.json", self._about())
        barrier(f"checkpoint-{step}-written")
        if is_main():
            if final.exists():
                final.rename(partial / "replaced")
                partial.rename(final)
                shutil.rmtree(final / "replaced")
            else:
                partial.rename(final)
            self._rotate(step)
        barrier(f"checkpoint-{step}-end")
        return final

    def _about(self) -> dict[str, Any]:
        versions = {
            name: importlib.metadata.version(name) for name in ("jax", "optax", "orbax-checkpoint")
        }
        text = json.dumps(self.config, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return {
            "config": self.config,
            "digest": digest,
            "versions": versions,
            "processes": jax.process_count(),
        }

    def _rotate(self, written: int) -> None:
        if self.total_limit is None or self.total_limit <= 0:
            return
        older = [step for step in self.steps() if step != written]
        for step in older[: max(0, len(older) + 1 - self.total_limit)]:
            shutil.rmtree(self.path(step))

    def find(self, resume: Literal[True] | str | Path) -> Path:
        """The directory that `resume_from_checkpoint` means.

        Args:
            resume: True for the newest of this run; or a checkpoint's path, a name within this run,
                or another run's directory (its newest).

        Raises:
            CheckpointError: there is none.
        """
        if resume is True:
            candidates = [self.directory]
        else:
            # An absolute path is the same in both ways.
            candidates = list(dict.fromkeys((Path(resume), self.directory / resume)))
        for path in candidates:
            if _NAME.fullmatch(path.name) and (path / "trainer_state.json").is_file():
                return path.absolute()
            if steps := _steps(path):
                return path.absolute() / f"checkpoint-{steps[-1]}"
        raise CheckpointError(
            f"resume_from_checkpoint={resume!r}: no checkpoint-<step> in "
            f"{' or '.join(str(path) for path in candidates)}."
        )

    def check(self, path: str | Path, like: TrainState) -> None:
        """Raises CheckpointError unless the checkpoint holds the leaves of `like`."""
        saved = _read_json(Path(path) / "tree.json")
        compare(saved, _shapes(like), where=str(path))

    def restore(self, path: str | Path, like: TrainState) -> Restored:
        """Reads a checkpoint into the shardings of another state.

        Args:
            path: of the checkpoint.
            like: a state of the same structure, concrete or abstract (`state.abstract`).

        Raises:
            CheckpointError: other leaves, shapes or dtypes than `like`'s (all listed, before any
                array is read), or a file that is missing or damaged.
        """
        path = Path(path).absolute()
        self.check(path, like)
        saved = _read_json(path / "config.json")["config"]
        names = (set(saved) | set(self.config)) - _HARMLESS
        missing = object()
        changed = sorted(
            name for name in names if saved.get(name, missing) != self.config.get(name, missing)
        )
        return Restored(
            _read_state(path / "state", like),
            _read_source(path),
            _read_json(path / "trainer_state.json"),
            changed if saved and self.config else [],
        )


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    found = (_NAME.fullmatch(entry.name) for entry in directory.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in found if match)


# ------------------------------------------------------------------ the state


def _flat(state: TrainState) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _shapes(state: TrainState) -> dict[str, list[Any]]:
    return {name: [list(x.shape), str(x.dtype)] for name, x in _flat(state).items()}


def compare(saved: Mapping[str, Any], wanted: Mapping[str, Any], *, where: str) -> None:
    """Raises CheckpointError with every difference between two {path: [shape, dtype]} trees."""
    problems = []
    for title, names in (
        ("missing in the checkpoint", [n for n in wanted if n not in saved]),
        ("unexpected in the checkpoint", [n for n in saved if n not in wanted]),
    ):
        if names:
            problems.append(f"{title}: {_listed(names)}")
    differ = [
        f"{name} is {_show(saved[name])}, not {_show(wanted[name])}"
        for name in wanted
        if name in saved and list(saved[name]) != list(wanted[name])
    ]
    if differ:
        problems.append(f"of another shape: {_listed(differ)}")
    if problems:
        raise CheckpointError(
            f"{where} does not fit this model and optimizer; {'; '.join(problems)}."
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _show(leaf: Any) -> str:
    shape, dtype = leaf
    return f"{dtype}[{','.join(map(str, shape))}]"


def _write_state(path: Path, state: TrainState) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, _flat(state))


def _read_state(path: Path, like: TrainState) -> TrainState:
    import orbax.checkpoint as ocp

    wanted = abstract(like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            leaves = checkpointer.restore(path, _flat(wanted))
    except Exception as error:  # Orbax raises bare Exceptions for damaged files
        raise CheckpointError(
            f"{path} cannot be read, it is damaged or incomplete: {error}"
        ) from error
    return jax.tree.unflatten(jax.tree.structure(wanted), [leaves[name] for name in _flat(wanted)])


# ------------------------------------------------------------------ the source and other JSON


def _write_source(directory: Path, source: Mapping[str, Any]) -> None:
    """Numpy arrays go to a .npz, everything else to JSON with a reference in their place."""
    arrays: dict[str, np.ndarray] = {}

    def strip(value: Any) -> Any:
        if isinstance(value, np.ndarray | jax.Array):
            arrays[name := f"a{len(arrays)}"] = np.asarray(value)
            return {"__array__": name}
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Mapping):
            return {str(key): strip(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [strip(item) for item in value]
        return value

    stem = directory / f"source-{jax.process_index()}"
    text = strip(source)
    np.savez(stem.with_suffix(".npz"), **arrays)  # type: ignore[arg-type]
    _write_json(stem.with_suffix(".json"), text)


def _read_source(directory: Path) -> dict[str, Any]:
    wrote, now = _read_json(directory / "config.json")["processes"], jax.process_count()
    stem = directory / f"source-{jax.process_index() if wrote == now else 0}"
    if not stem.with_suffix(".npz").is_file():
        raise CheckpointError(f"{directory} is not whole: it lacks {stem.name}.npz.")
    arrays = _read_arrays(stem.with_suffix(".npz"))
    if wrote != now and arrays:
        # A position in the data is the same for everybody; rows in a buffer are not.
        raise CheckpointError(
            f"{directory} holds the rollouts of {wrote} processes, so {now} cannot resume it."
        )

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {"__array__"}:
                if value["__array__"] not in arrays:
                    raise CheckpointError(
                        f"{stem.name}.json in {directory} names array {value['__array__']!r}, "
                        f"which {stem.name}.npz lacks."
                    )
                return arrays[value["__array__"]]
            return {key: fill(item) for key, item in value.items()}
        return [fill(item) for item in value] if isinstance(value, list) else value

    return fill(_read_json(stem.with_suffix(".json")))


def _read_arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as found:
            return dict(found)
    except Exception as error:  # of the zip, of numpy's headers, of the tokenizer that reads them
        raise CheckpointError(f"{file} cannot be read, it is damaged: {error}") from error


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} is not a complete checkpoint: no {path.name}."
        ) from None
    except ValueError as error:  # not JSON, or not text
        raise CheckpointError(f"{path} is damaged: {error}") from None
