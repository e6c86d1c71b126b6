#!/usr/bin/env bash
# One command from nothing to a language model that has learned from human feedback, with a report.
#
#   scripts/quickstart.sh [--full] [--model NAME_OR_PATH] [--policy ppo|grpo|dpo] [--stage NAME]
#                         [--resume] [--seed N] [--output DIR]
#
#   --full      the proper run (hours on a CPU) instead of the short one (under 25 minutes)
#   --model     start from this model: a hub name, a checkpoint directory or a GGUF file
#   --policy    how the policy is trained in the third stage (default: ppo)
#   --stage     run only this stage (data, sft, reward, ppo, report); what it builds on must exist
#   --resume    go on where an earlier call stopped: finished stages are skipped
#   --seed      of the data split, the training and the samples (default: 0)
#   --output    of everything (default: runs/quickstart)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for argument in "$@"; do
  case $argument in
    -h | --help) sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
  esac
done
python=$(bash "$root/scripts/setup.sh" --extra quickstart | tail -n 1)
exec "$python" "$root/scripts/quickstart.py" "$@"
