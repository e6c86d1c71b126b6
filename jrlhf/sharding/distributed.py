"""Several processes: joined from the environment, one of them the main one."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax

from jrlhf.errors import ConfigError

_ADDRESS, _COUNT, _ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def initialize(environment: Mapping[str, str] | None = None) -> bool:
    """Joins the other processes when the environment names them; call before any computation.

    Reads JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    Without any of them it does nothing: one process. Calling it again does nothing either.

    Returns:
        Whether this process is one of several.

    Raises:
        ConfigError: only some of the variables are set, or a number is none or out of range.
    """
    values = os.environ if environment is None else environment
    given = {name: values[name] for name in (_ADDRESS, _COUNT, _ID) if values.get(name)}
    if not given:
        return False
    if missing := [name for name in (_ADDRESS, _COUNT, _ID) if name not in given]:
        raise ConfigError(
            f"{', '.join(given)} set, but not {', '.join(missing)}: a run of several processes "
            "needs all three."
        )
    count, index = _number(_COUNT, given[_COUNT]), _number(_ID, given[_ID])
    if not 0 <= index < count:
        raise ConfigError(f"{_ID}={index} must lie between 0 and {_COUNT}-1 = {count - 1}.")
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(given[_ADDRESS], num_processes=count, process_id=index)
    return count > 1


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} must be an integer, got {text!r}.") from None


def is_main() -> bool:
    """Whether this process writes the logs and files that exist once per run."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come here; nothing with one process."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
