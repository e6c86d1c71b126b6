"""Rewards: functions with TRL's signature, and classifiers that read prompt and completion.

A reward function runs on the host and is called once per rollout with everything about it:
`f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric)`. It gives
one number per completion, None (or NaN) where it has no opinion. It may be a coroutine function.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jrlhf.errors import RewardError, suggest
from jrlhf.rollout.reward_model import RewardModel

RewardFunction = Callable[..., Any] | RewardModel


class Rewards(NamedTuple):
    """What the reward functions said.

    Attributes:
        table: one row per completion, one column per function, float32; NaN: no opinion.
        total: the weighted sum per completion, NaN where no function had an opinion.
        logged: what functions reported through `log_metric`.
        extra: columns that functions reported through `log_extra`, for tables of completions.
    """

    table: np.ndarray
    total: np.ndarray
    logged: dict[str, float]
    extra: dict[str, list[Any]]


class Completions(NamedTuple):
    """Finished samples as reward functions see them; all lists have one entry per completion.

    Attributes:
        prompts: as in the dataset: text or messages.
        completions: text, or `[{"role": "assistant", "content": text}]` for message prompts.
        prompt_ids: token ids of the prompts.
        completion_ids: token ids of the completions, EOS included.
        finished: ended by EOS or a stop string.
        columns: the dataset's other columns.
    """

    prompts: list[Any]
    completions: list[Any]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    finished: list[bool]
    columns: Mapping[str, list[Any]]


def function_name(function: Any) -> str:
    """The name that metrics carry: a function's own, also inside `functools.partial`."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


class RewardSuite:
    """Several reward functions and their weights.

    Attributes:
        names: one name per function, made unique with a number where two are equal.
        weights: one weight per function.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
    ) -> None:
        """Checks the functions.

        Raises:
            RewardError: no function, one that cannot be called, or weights that do not match.
        """
        several = isinstance(functions, Sequence) and not isinstance(functions, str)
        self.functions: list[Any] = list(functions) if several else [functions]  # type: ignore
        if not self.functions:
            raise RewardError("No reward function was given.")
        for function in self.functions:
            if not callable(function):
                raise RewardError(f"A reward function must be callable, got {function!r}.")
        if weights is not None and len(weights) != len(self.functions):
            raise RewardError(
                f"reward_weights has {len(weights)} entries for {len(self.functions)} functions."
            )
        self.weights = np.ones(len(self.functions)) if weights is None else np.asarray(weights)
        self.names: list[str] = []
        for function in self.functions:
            name, copy = function_name(function), 2
            base = name
            while name in self.names:
                name, copy = f"{base}_{copy}", copy + 1
            self.names.append(name)

    def __call__(self, done: Completions, *, trainer_state: Any = None) -> Rewards:
        """Calls every function; coroutines run side by side.

        Raises:
            RewardError: a function raised, or returned the wrong length or type.
        """
        logged: dict[str, float] = {}
        extra: dict[str, list[Any]] = {}
        offered = {
            **done.columns,
            "prompts": done.prompts,
            "completions": done.completions,
            "completion_ids": done.completion_ids,
            "trainer_state": trainer_state,
            "log_extra": extra.__setitem__,
            "log_metric": logged.__setitem__,
        }
        results = []
        for name, function in zip(self.names, self.functions, strict=True):
            if isinstance(function, RewardModel):
                results.append(function.score(done))
            else:
                results.append(_call(name, function, offered))
        waiting = {i: r for i, r in enumerate(results) if inspect.isawaitable(r)}
        if waiting:
            names = [self.names[i] for i in waiting]
            for i, value in zip(waiting, _await_all(names, list(waiting.values())), strict=True):
                results[i] = value
        rows = len(done.completions)
        table = np.stack(
            [_column(n, r, rows) for n, r in zip(self.names, results, strict=True)], axis=1
        )
        return Rewards(table, self._total(table), logged, extra)

    def _total(self, table: np.ndarray) -> np.ndarray:
        # A row that nobody scored must stay NaN: a 0 would shift its group's baseline.
        total = np.nansum(table * self.weights, axis=1)
        return np.where(np.isnan(table).all(axis=1), np.nan, total).astype(np.float32)


def _call(name: str, function: Callable[..., Any], offered: dict[str, Any]) -> Any:
    """Calls with what the function's signature asks for."""
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # builtins without a signature take everything
        parameters = {}
    takes_all = not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    missing = [
        p.name
        for p in parameters.values()
        if p.name not in offered
        and p.default is p.empty
        and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if missing:
        raise RewardError(
            f"Reward function {name} wants an argument {missing[0]!r}; there are "
            f"{sorted(offered)}.{suggest(missing[0], offered)}"
        )
    wanted = offered if takes_all else {k: v for k, v in offered.items() if k in parameters}
    try:
        return function(**wanted)
    except Exception as error:
        raise _failed(name, error) from error


def _failed(name: str, error: BaseException) -> RewardError:
    return RewardError(f"Reward function {name} raised {type(error).__name__}: {error}")


def _await_all(names: list[str], waiting: list[Awaitable[Any]]) -> list[Any]:
    """Runs coroutines to their end, also when the caller already sits in an event loop."""

    async def gather() -> list[Any]:
        return await asyncio.gather(*waiting, return_exceptions=True)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        results = asyncio.run(gather())
    else:  # a notebook: its loop is busy with us, so another thread runs one of its own
        with ThreadPoolExecutor(1) as pool:
            results = pool.submit(asyncio.run, gather()).result()
    for name, result in zip(names, results, strict=True):
        if isinstance(result, BaseException):
            raise _failed(name, result) from result
    return results


def _column(name: str, result: Any, rows: int) -> np.ndarray:
    """One function's answers as float32, None as NaN."""
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__len__"):
        raise RewardError(
            f"Reward function {name} must return a list of {rows} numbers, got "
            f"{type(result).__name__}: {result!r:.80}."
        )
    if len(result) != rows:
        raise RewardError(
            f"Reward function {name} returned {len(result)} rewards for {rows} completions."
        )
    column = np.full(rows, np.nan, np.float32)
    for i, value in enumerate(result):
        if value is None:
            continue
        number = _number(value)
        if number is None or math.isinf(number):
            raise RewardError(
                f"Reward function {name} returned {value!r:.80} for completion {i}; expected a "
                "finite number, or None for no opinion."
            )
        column[i] = number
    return column


def _number(value: Any) -> float | None:
    if isinstance(value, str | bytes) or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
