"""Where rows come from: hub names, local files, `datasets` objects, lists of dicts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jrlhf.data.rows import first_row
from jrlhf.errors import (
    ConfigError,
    DataError,
    EmptyDatasetError,
    MissingColumnError,
    MissingFileError,
    suggest,
)

# Reader of `datasets` for each file type; each may also be compressed.
READERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")


def load_rows(
    source: Any,
    *,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    name: str = "train",
) -> Any:
    """Loads a dataset from wherever a user may have it.

    Args:
        source: a hub name ("org/dataset"), a local file (.jsonl, .json, .csv, .tsv, .parquet,
            .arrow, .txt, also .gz) or directory, a Dataset, IterableDataset or DatasetDict, a list
            of dicts or a dict of columns.
        split: which split of a hub name, directory or DatasetDict; a single file has only one.
        config: the configuration of a hub dataset, or of a directory with a card, that has several.
        streaming: read rows as they are needed.
        name: what messages call it.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset` when streaming.

    Raises:
        MissingFileError: the path does not exist, or the name is neither a path nor on the hub.
        EmptyDatasetError: it has no rows.
        DataError: it cannot be read.
    """
    import datasets
    import pyarrow

    if source is None:
        raise ConfigError(f"No {name} dataset was given.")
    if isinstance(source, (str, Path)):
        dataset = _by_name(str(source), split, config, streaming)
    elif isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        dataset = source
    elif isinstance(source, Mapping):
        values = list(source.values())
        if all(isinstance(v, (datasets.Dataset, datasets.IterableDataset)) for v in values):
            dataset = _split_of(source, split, name)
        else:
            dataset = _from(datasets.Dataset.from_dict, dict(source), name)
    elif isinstance(source, (list, tuple)):
        dataset = _from(datasets.Dataset.from_list, list(source), name)
    else:
        raise DataError(
            f"The {name} dataset must be a name, a path, a datasets.Dataset or a list of dicts, "
            f"got {type(source).__name__}."
        )
    if streaming and isinstance(dataset, datasets.Dataset):
        dataset = dataset.to_iterable_dataset()
    try:
        first_row(dataset, name)
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError) as error:
        # A stream is read only now.
        raise DataError(f"The {name} dataset cannot be read: {error}") from error
    return dataset


def _from(build: Any, rows: Any, name: str) -> Any:
    import pyarrow

    for number, row in enumerate(rows if isinstance(rows, list) else []):
        if not isinstance(row, dict):
            raise DataError(
                f"Row {number} of the {name} dataset must be a dict, got {type(row).__name__}."
            )
    try:
        return build(rows)
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        message = f"The rows of the {name} dataset do not share one schema: {error}"
        raise DataError(message) from error


def _split_of(splits: Mapping[str, Any], split: str, name: str) -> Any:
    if split in splits:
        return splits[split]
    if len(splits) == 1:
        return next(iter(splits.values()))
    if not splits:
        raise EmptyDatasetError(f"The {name} dataset has no splits.")
    raise DataError(
        f'The {name} dataset has no split "{split}", only {sorted(splits)}.{suggest(split, splits)}'
    )


def file_type(path: Path) -> str | None:
    """The `datasets` reader for a file name, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return READERS.get(suffixes[-1]) if suffixes else None


def _by_name(source: str, split: str, config: str | None, streaming: bool) -> Any:
    path = Path(source).expanduser()
    if path.is_file():
        if config is not None:
            raise ConfigError(f"{source} is a single file and has no configuration {config!r}.")
        return _local_file(path, split, streaming)
    if path.is_dir():
        return _local_directory(path, split, config, streaming)
    if file_type(path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise MissingFileError(f"No such dataset file or directory: {source}.{_nearest(path)}")
    return _read(source, config, what=source, split=split, streaming=streaming)


def _local_file(path: Path, split: str, streaming: bool) -> Any:
    reader = file_type(path)
    if reader is None:
        raise DataError(f"{path}: unknown dataset file type; known are {', '.join(READERS)}.")
    if path.stat().st_size == 0:
        raise EmptyDatasetError(f"{path} is empty.")
    options: dict[str, Any] = {"data_files": {"train": str(path)}}
    if ".tsv" in path.suffixes:
        options["sep"] = "\t"
    # A single file is one split; only a slice of it, like "train[:100]", can be meant.
    part = "train" + split[split.index("[") :] if "[" in split else "train"
    return _read(reader, None, what=str(path), split=part, streaming=streaming, **options)


def _local_directory(path: Path, split: str, config: str | None, streaming: bool) -> Any:
    import datasets

    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        if config is not None:
            raise ConfigError(f"{path} was saved to disk and has no configuration {config!r}.")
        saved = datasets.load_from_disk(str(path))
        return _split_of(saved, split, str(path)) if isinstance(saved, Mapping) else saved
    if not any(file_type(file) for file in path.rglob("*") if file.is_file()):
        raise MissingFileError(f"{path} holds no dataset file ({', '.join(READERS)}).")
    return _read(str(path), config, what=str(path), split=split, streaming=streaming)


def _read(
    builder: str, config: str | None, *, what: str, split: str, streaming: bool, **options: Any
) -> Any:
    """`datasets.load_dataset` with its many exceptions turned into ours."""
    import datasets
    import pyarrow

    try:
        return datasets.load_dataset(builder, config, split=split, streaming=streaming, **options)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise MissingFileError(
            f'"{what}" is neither a local file or directory nor a dataset on the hub: {error}'
        ) from error
    except (ConnectionError, OSError) as error:
        raise MissingFileError(
            f'"{what}" is no local file or directory, and the hub cannot be reached: {error}'
        ) from error
    except (
        datasets.exceptions.DatasetsError,
        datasets.exceptions.DatasetGenerationError,
        pyarrow.ArrowException,
        ValueError,
        KeyError,
    ) as error:
        cause = error.__cause__ or error
        if "corresponds to no data" in str(error):
            raise EmptyDatasetError(f"{what} has no rows in split {split!r}.") from error
        raise DataError(f"{what} cannot be read as a dataset (split {split!r}): {cause}") from error


def _nearest(path: Path) -> str:
    """A hint at files of a similar name beside the missing one."""
    folder = path.parent
    if not folder.is_dir():
        return f" The directory {folder} does not exist either."
    names = [entry.name for entry in folder.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f' Did you mean "{folder / near[0]}"?' if near else ""


def require_columns(row: Mapping[str, Any], wanted: Iterable[Iterable[str]], *, name: str) -> None:
    """Checks that a dataset has all columns of one of the alternatives.

    Raises:
        MissingColumnError: naming the columns there are, those needed, and the likely typing error.
    """
    alternatives = [tuple(columns) for columns in wanted]
    if any(all(column in row for column in columns) for columns in alternatives):
        return
    found = list(row)
    needed = " | ".join(" + ".join(columns) for columns in alternatives)
    spare = [column for column in found if all(column not in names for names in alternatives)]
    hints = dict.fromkeys(
        f' Is "{near[0]}" the column {column}?'
        for columns in alternatives
        for column in columns
        if column not in row and (near := difflib.get_close_matches(column, spare, n=1))
    )
    raise MissingColumnError(
        f"The {name} dataset has the columns {found}; needed: {needed}.{''.join(hints)}"
    )
