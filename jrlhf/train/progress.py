"""What a person sees while training: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from jrlhf.train.metrics import Numbers

# Seconds without a word after which a long rollout says how far it is.
PATIENCE = 10.0


class Progress:
    """A bar with loss, tokens/s and ETA on a terminal; elsewhere one line per log.

    Args:
        total: steps of the whole run.
        initial: steps done before this process.
        plain: True: lines even on a terminal.
        silent: nothing at all (all processes but the first).
        stream: where to; stderr by default.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        plain: bool = False,
        silent: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.total, self.initial, self.silent = total, initial, silent
        self.stream = stream or sys.stderr
        self._bar: Any = None
        self._begin = self._told = time.perf_counter()
        if not silent and not plain and self.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=initial, file=self.stream, dynamic_ncols=True, unit="step"
            )

    def step(self) -> None:
        """One more step was started."""
        if self._bar is not None:
            self._bar.update(1)

    def log(self, step: int, values: Numbers) -> None:
        shown = {k: v for k, v in values.items() if _shown(k) and isinstance(v, int | float)}
        if self.silent or not shown:
            return
        if self._bar is not None and "tokens_per_second" in shown:
            self._bar.set_postfix_str(_line(shown))
        else:
            self.say(f"step {step}/{self.total}  {_line(shown)}{self._eta(step)}")

    def sampling(self, done: int, total: int) -> None:
        """Within a step, so many completions are there: said when nothing was said for a while."""
        now = time.perf_counter()
        if not self.silent and done < total and now - self._told >= PATIENCE:
            self.say(f"  sampled {done} of {total} completions")

    def say(self, text: str) -> None:
        """Writes one line, above the bar where there is one."""
        if self.silent:
            return
        self._told = time.perf_counter()
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            self.stream.write(text + "\n")
            self.stream.flush()

    def _eta(self, step: int) -> str:
        done = step - self.initial
        if done <= 0 or step >= self.total:
            return ""
        left = (time.perf_counter() - self._begin) / done * (self.total - step)
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"  ETA {hours}:{minutes:02d}:{seconds:02d}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


_ALWAYS = ("loss", "reward", "kl", "grad_norm", "learning_rate", "epoch", "tokens_per_second")


def _shown(name: str) -> bool:
    return name in _ALWAYS or name.startswith(("eval_", "train_")) or name.endswith("accuracy")


def _place(name: str) -> int:
    """The best-known numbers first; a stable sort leaves the others in their order."""
    return _ALWAYS.index(name) if name in _ALWAYS else len(_ALWAYS)


def _line(values: Numbers) -> str:
    parts = []
    for name in sorted(values, key=_place):
        value = values[name]
        if name == "tokens_per_second":
            parts.append(f"{value:,.0f} tokens/s")
        else:
            parts.append(f"{name} {value:.4g}")
    return "  ".join(parts)
