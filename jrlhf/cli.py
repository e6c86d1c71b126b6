"""The `jrlhf` command: one verb per job, one file per verb in `commands/`.

Only the chosen verb is imported, so that `--help` and a misspelt verb answer at once.
"""

from __future__ import annotations

import importlib
import os
import sys

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


if __name__ == "__main__":
    sys.exit(main())
