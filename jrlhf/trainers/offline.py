"""Data of the offline trainers: rows, one static length, loaders for training and evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jrlhf.data.collate import padded_length
from jrlhf.data.encode import Encoder
from jrlhf.data.loader import Loader, StreamLoader
from jrlhf.data.rows import RowStream, limit_ids
from jrlhf.data.sources import load_rows
from jrlhf.errors import ConfigError
from jrlhf.sharding.mesh import check_batch, data_shards
from jrlhf.trainers.base import LoaderSource
from jrlhf.trainers.setup import batch_rows
from jrlhf.types import Batch


class Training(NamedTuple):
    """What the loop needs to know of the training set."""

    source: LoaderSource
    total_steps: int
    steps_per_epoch: int | None


def encoder(tokenizer: Any, chat_template_path: str | None) -> Any:
    """The tokenizer with another chat template: a Jinja file's, or another model's."""
    if chat_template_path is None:
        return tokenizer
    path = Path(chat_template_path)
    if path.is_file():
        try:
            return Encoder(tokenizer, chat_template=path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"chat_template_path={chat_template_path!r}: {error}") from error
    from jrlhf.models.tokenizer import load_tokenizer

    return Encoder(tokenizer, chat_template=load_tokenizer(chat_template_path).chat_template)


class OfflineData:
    """Turns datasets into sources.

    Attributes:
        mesh: where batches go.
    """

    def __init__(
        self,
        args: Any,
        mesh: jax.sharding.Mesh,
        rows_of: Callable[..., Any],
        collate: Callable[..., Any],
        *,
        max_length: int,
        vocab_size: int,
        always_longest: bool = False,
        shuffle: bool = True,
        annotate: Callable[[Batch], Batch] | None = None,
    ) -> None:
        """Prepares.

        Args:
            args: the trainer's config.
            mesh: where batches go.
            rows_of: dataset -> tokenized rows.
            collate: rows, size, length -> numpy batch.
            max_length: longest row.
            vocab_size: ids lie below.
            always_longest: pad to `max_length` even if all rows are shorter (packed rows are not).
            shuffle: of the training set.
            annotate: adds to each device batch, e.g. reference log-probs.
        """
        self.mesh, self.annotate = mesh, annotate
        self._args, self._rows_of, self._collate = args, rows_of, collate
        self._max_length, self._always_longest = max_length, always_longest
        self._shuffle, self._vocab_size = shuffle, vocab_size

    def training(self, dataset: Any) -> Training:
        """Loads and tokenizes the training set; raises before any model is loaded."""
        args, rows = self._args, self._rows(dataset, "train")
        size = batch_rows(args, self.mesh)
        check_batch(size, self.mesh, accumulate=args.gradient_accumulation_steps)
        seed = args.seed if args.data_seed is None else args.data_seed
        processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        collate = functools.partial(self._collate, length=self._length(rows))
        loader: Loader | StreamLoader
        if isinstance(rows, RowStream):
            loader = StreamLoader(
                rows, collate, batch_size=size, seed=seed, drop_last=args.dataloader_drop_last,
                shuffle_buffer=1000 if self._shuffle else 0, **processes,
            )  # fmt: skip
        else:
            loader = Loader(
                rows, collate, batch_size=size, seed=seed, drop_last=args.dataloader_drop_last,
                shuffle=self._shuffle, **processes,
            )  # fmt: skip
        steps = loader.total_steps(epochs=args.num_train_epochs, max_steps=args.max_steps)
        source = LoaderSource(loader, self.mesh, self._annotated)
        return Training(source, steps, loader.steps_per_epoch)

    def evaluation_if_given(self, dataset: Any) -> Callable[[], LoaderSource] | None:
        """The evaluation set, or None where there is none.

        Raises:
            ConfigError: there is none, and the config asks for evaluations.
        """
        if dataset is not None:
            return self.evaluation(dataset)
        if (strategy := self._args.eval_strategy) != "no":
            raise ConfigError(f"eval_strategy={strategy!r} needs an eval_dataset.")
        return None

    def evaluation(self, dataset: Any) -> Callable[[], LoaderSource]:
        """The evaluation set, in order; the last batch is filled with rows that do not count."""
        rows = self._rows(dataset, "eval", streaming=False)
        if not hasattr(rows, "__len__"):
            raise ConfigError(
                "eval_dataset is a stream, and is read again at every evaluation: load it whole, "
                "or give its first rows, datasets.Dataset.from_list(list(stream.take(500)))."
            )
        loader = Loader(
            rows,
            functools.partial(self._collate, length=self._length(rows)),
            batch_size=self._args.per_device_eval_batch_size * data_shards(self.mesh),
            shuffle=False,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return lambda: LoaderSource(loader, self.mesh, self._annotated)

    def _annotated(self, batch: Batch) -> Batch:
        return batch if self.annotate is None else self.annotate(batch)

    def _rows(self, dataset: Any, name: str, **options: Any) -> Any:
        rows = self._rows_of(load_rows(dataset, name=name, **options), name=name)
        return limit_ids(rows, self._vocab_size, name=name)

    def _length(self, rows: Any) -> int:
        multiple = self._args.pad_to_multiple_of
        if self._always_longest or isinstance(rows, RowStream):
            return padded_length(self._max_length, multiple=multiple)
        return padded_length(rows.longest, max_length=self._max_length, multiple=multiple)
