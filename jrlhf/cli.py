"""The `jrlhf` command: one verb per job, one file per verb in `commands/`.

Only the chosen verb is imported, so that `--help` and a misspelt verb answer at once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from pathlib import Path

from jrlhf.errors import ConfigError, JrlhfError, suggest

VERBS: dict[str, str] = {
    "sft": "fine-tune a language model on texts, dialogues or prompt-completion pairs",
    "reward": "train a reward model on (chosen, rejected) pairs",
    "dpo": "optimise a policy directly on preference pairs",
    "ppo": "optimise a policy against a reward model with PPO",
    "grpo": "optimise a policy against reward functions with GRPO",
    "label": "sample completion pairs and label them with a reward model",
    "generate": "sample completions of prompts",
    "evaluate": "compare a policy with its starting point on held-out prompts",
    "report": "draw the runs and the evaluation as one HTML page and a table",
}


def usage() -> str:
    rows = "\n".join(f"  {verb:<10}{summary}" for verb, summary in VERBS.items())
    return (
        "usage: jrlhf VERB [--config FILE.yaml] [--field value ...]\n\n"
        f"{rows}\n\n"
        "`jrlhf VERB --help` lists the fields of a verb. The command line wins over the file."
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one verb. Exit codes: 0 done, 1 a bug (with its traceback), 2 a mistake in the input."""
    # transformers says that PyTorch is missing; here that is as it should be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    words = list(sys.argv[1:] if argv is None else argv)
    verb, rest = (words or ["help"])[0], words[1:]
    try:
        if verb in ("-h", "--help", "help"):
            print(usage(), flush=True)
            return 0
        if verb == "--version":
            from jrlhf import __version__

            print(__version__)
            return 0
        if verb not in VERBS:
            raise ConfigError(
                f"There is no verb {verb!r}.{suggest(verb, VERBS)} See `jrlhf --help`."
            )
        return importlib.import_module(f"jrlhf.commands.{verb}").main(rest) or 0
    except JrlhfError as error:
        print(f"jrlhf {verb}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has had enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print(f"jrlhf {verb}: interrupted", file=sys.stderr)
        return 130


def run() -> int:
    """What the program `jrlhf` runs: `main`, with huge pages where the verb has a model."""
    if sys.argv[1:2] and sys.argv[1] in VERBS and sys.argv[1] != "report":
        ask_for_huge_pages()
    return main()


def ask_for_huge_pages() -> None:
    """Starts this process again (the same one, by `exec`) with `glibc.malloc.hugetlb=1`.

    On CPUs XLA takes its working memory anew for every step. In pages of 4 KB a step
    takes 7 to 10 % longer (`docs/results.md`), and glibc reads the setting only where a process
    starts. A setting in GLIBC_TUNABLES stays; nothing is done where the kernel gives huge
    pages unasked or never, or glibc is older than 2.35.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in tunables or not huge_pages_on_request():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))
    with contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def huge_pages_on_request() -> bool:
    """Whether the kernel gives huge pages to those who ask, and glibc can ask."""
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    except (AttributeError, OSError, ValueError):  # no Linux, or another libc
        return False
    version = tuple(int(number) for number in re.findall(r"\d+", libc)[:2])
    return version >= (2, 35) and "[madvise]" in modes


if __name__ == "__main__":
    sys.exit(run())
