"""What all faces share: the run itself, evaluation, saving, and what users may look at.

A face prepares rows, models and an algorithm in its constructor and calls `_prepare`; nothing is
compiled before `train` or `evaluate`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jrlhf.data.rows import Rows
from jrlhf.errors import ConfigError
from jrlhf.model import Model
from jrlhf.models import hub
from jrlhf.models.build import combine, partition
from jrlhf.models.moe import balancing_coefficient
from jrlhf.rollout.score import Actor
from jrlhf.sharding.place import params_shardings, put_batch
from jrlhf.train.callbacks import TrainerState
from jrlhf.train.loop import Loop, TrainOutput
from jrlhf.train.optim import make_optimizer
from jrlhf.train.state import TrainState, new_state, state_shardings
from jrlhf.train.step import make_evaluation, make_step
from jrlhf.trainers import adapters, publish
from jrlhf.types import Batch, PyTree

log = logging.getLogger(__name__)


class LoaderSource:
    """The offline source of the loop: a loader's batches on the device, perhaps annotated."""

    def __init__(
        self,
        loader: Any,
        mesh: jax.sharding.Mesh,
        annotate: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self.loader, self.mesh = loader, mesh
        self._annotate = annotate or (lambda batch: batch)

    def batch(self, step: int, state: TrainState | None = None) -> Batch:
        return self._annotate(put_batch(self.mesh, self.loader.batch(step)))

    def metrics(self) -> Mapping[str, float]:
        return {}

    def state_dict(self) -> Mapping[str, Any]:
        return {}  # the order is a function of (seed, epoch, step)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        pass

    def watch(self, tell: Callable[[int, int], None]) -> None:
        pass  # a batch that lies ready takes no time


class Trainer:
    """Abstract: `train`, `evaluate`, `save_model` and `state`, as in transformers.

    Attributes:
        args: the config.
        model: the model in training; its `params` are the newest ones.
        processing_class: its tokenizer.
    """

    args: Any
    model: Model
    processing_class: Any
    _loop: Loop

    def _prepare(
        self,
        *,
        actor: Actor,
        source: Any,
        total_steps: int,
        steps_per_epoch: int | None,
        evaluation: Callable[[], Any] | None = None,
        callbacks: Sequence[Any] | None = None,
        keep_start: bool = False,
        entropy: bool = False,
        value_model: Model | None = None,
        dropout: bool = True,
        router_aux_loss_coef: float | None = 0.0,
        dataset: Any = None,
    ) -> None:
        """Joins the parts into a loop.

        Args:
            actor: the policy (or classifier) as a function of (trainable, frozen).
            source: the loop's source of batches.
            total_steps, steps_per_epoch: of the run; None where there are no epochs.
            evaluation, callbacks: what makes the evaluation set's source; those of the user.
            keep_start: the starting parameters stay alive, for they are the reference.
            entropy: also log the entropy.
            value_model: a separate value model, trained with the policy.
            dropout: a training step drops inputs of adapters, as they ask for.
            router_aux_loss_coef: weight of a router's load-balancing loss; None: the model's own.
            dataset: the training set as it was given, for the model's card.
        """
        self._value_model, self._keep_start = value_model, keep_start
        self._total_steps, self._evaluation = total_steps, evaluation
        self._dataset = publish.hub_name(dataset)
        (trainable, self._frozen), mesh = self._split(), self._mesh()
        self._tx, schedule = make_optimizer(self.args, total_steps, axes=self._trees(_axes))
        self._shardings = state_shardings(self._tx, trainable, self._trees(_placed))
        balance = balancing_coefficient(self.model.net.spec, router_aux_loss_coef)
        self._loss = functools.partial(actor.loss, self.args, entropy=entropy, balance=balance)
        step = make_step(
            self._loss,
            self._tx,
            accumulate=self.args.gradient_accumulation_steps,
            max_grad_norm=self.args.max_grad_norm,
            mesh=mesh,
            shardings=self._shardings,
            schedule=schedule,
            dropout=adapters.dropout_seed(self.model, self.args.seed, wanted=dropout),
        )
        self._sums = make_evaluation(self._loss, mesh=mesh)
        self._loop = Loop(
            args=self.args,
            step=step,
            source=source,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            evaluate=self._evaluate if evaluation else None,
            callbacks=[*(callbacks or ()), *self._uploads()],
            context={"model": self.model, "processing_class": self.processing_class},
            about={**adapters.about(self.model), **_data(source)},
        )

    def _mesh(self) -> jax.sharding.Mesh:
        assert self.model.mesh is not None, "open_model puts every model on a mesh"
        return self.model.mesh

    def _trees(self, part: Callable[[Model], PyTree]) -> PyTree:
        """A tree of the trained parameters: the policy's, or {"policy": …, "value": …}."""
        if self._value_model is None:
            return part(self.model)
        return {"policy": part(self.model), "value": part(self._value_model)}

    def _split(self) -> tuple[PyTree, PyTree]:
        return tuple(self._trees(lambda m, i=i: partition(m.params, m.net)[i]) for i in (0, 1))  # type: ignore[misc]

    # -------------------------------------------------------------- the public face

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Trains to the end and returns (global_step, training_loss, metrics).

        Args:
            resume_from_checkpoint: True (the newest in output_dir) or a checkpoint's directory.

        Raises:
            CheckpointError: there is nothing to resume from, or it does not fit.
            TrainingInterrupted: SIGTERM or SIGINT came; the last step is saved.
            HubError: with push_to_hub, the hub does not want the model.
        """
        publish.create(self.args)
        trainable, _ = self._split()
        state = new_state(
            trainable, self._tx, shardings=self._shardings, donate=not self._keep_start
        )
        loop = self._loop
        loop.state = state
        self._follow(loop)
        _, output = loop.run(state, self._frozen, resume_from_checkpoint=resume_from_checkpoint)
        return output

    def _follow(self, loop: Loop) -> None:
        """From now on the models' parameters are those of the loop's newest state."""

        def newest(name: str | None) -> PyTree:
            assert loop.state is not None
            if name is None:
                return combine(loop.state.params, self._frozen)
            return combine(loop.state.params[name], self._frozen[name])

        split = self._value_model is not None
        self.model.params = functools.partial(newest, "policy" if split else None)
        if self._value_model is not None:
            self._value_model.params = functools.partial(newest, "value")

    def evaluate(
        self, eval_dataset: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Means over the evaluation set, divided once at its end."""
        if eval_dataset is not None:
            self._evaluation = self._evaluation_of(eval_dataset)
        if self._evaluation is None:
            raise ConfigError(f"{type(self).__name__}.evaluate needs an eval_dataset.")
        metrics = self._evaluate(None, metric_key_prefix)
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        return metrics

    def _evaluation_of(self, dataset: Any) -> Callable[[], Any]:
        raise ConfigError(f"{type(self).__name__} has no evaluation loss.")

    def _evaluate(self, state: TrainState | None, prefix: str = "eval") -> dict[str, float]:
        assert self._evaluation is not None
        source = self._evaluation()
        trainable = self._split()[0] if state is None else state.params
        batches = (source.batch(step) for step in range(source.loader.steps_per_epoch))
        values = self._sums(trainable, self._frozen, batches)
        return {f"{prefix}_{name}": value for name, value in values.items()}

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Writes the model as a Hugging Face directory with a card; default `output_dir/model`.

        With `push_to_hub` it is uploaded, too.

        Raises:
            HubError: the hub does not take it; it is on this machine all the same.
        """
        target = self._save(output_dir)
        if self.args.push_to_hub:
            publish.upload(self.args, target, "Model save")

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> str | None:
        """Saves the model to `output_dir/model`, uploads it and returns the commit's URL.

        The first process uploads; on the others it returns None.

        Args:
            commit_message: of the commit.
            blocking: always so.
            token, revision, private: in place of the config's.
            **card: of `create_model_card`.

        Raises:
            HubError: the hub does not take it.
        """
        target = self._save(None, **card)
        return publish.upload(
            self.args, target, commit_message, token=token, private=private, revision=revision
        )

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        """Writes README.md beside the saved model: base, data, arguments, metrics, versions."""
        target = self._model_directory()
        target.mkdir(parents=True, exist_ok=True)
        publish.write_card(target, self, model_name=model_name,
                           dataset_name=dataset_name or self._dataset, tags=tags)  # fmt: skip

    def _model_directory(self) -> Path:
        return Path(self.args.output_dir) / "model"

    def _save(self, output_dir: str | Path | None, **card: Any) -> Path:
        if output_dir is None or output_dir == "":
            output_dir = self._model_directory()
        target = hub.target(output_dir)
        self._exported().save_pretrained(target, tokenizer=self.processing_class)
        publish.write_card(target, self, **{"dataset_name": self._dataset, **card})
        log.info("Saved the model to %s.", target)
        return target

    def _uploads(self) -> list[publish.PushAtSave]:
        """The callback that uploads the model during the run, where the config asks for it."""
        wanted = self.args.push_to_hub and self.args.hub_strategy == "every_save"
        return [publish.PushAtSave(self)] if wanted else []

    def _exported(self) -> Model:
        return self.model

    @property
    def state(self) -> TrainerState:
        """global_step, epoch, log_history, … of the run."""
        return self._loop.trainer_state


def _placed(model: Model) -> PyTree:
    """Shardings of a model's trainable parameters."""
    assert model.mesh is not None
    trainable = partition(model.net.abstract(), model.net)[0]
    return params_shardings(model.net, trainable, model.mesh)


def _axes(model: Model) -> PyTree:
    """The axis names of what is trained."""
    return partition(model.net.axes(), model.net)[0]


def _data(source: Any) -> dict[str, str]:
    """What was read, for the config in checkpoints: a resumed run says if it reads other rows."""
    rows = getattr(getattr(source, "loader", None), "rows", None)
    return {"train_rows": rows.fingerprint()} if isinstance(rows, Rows) else {}
