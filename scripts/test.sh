#!/usr/bin/env bash
# Sets everything up and passes the tests: lint, types, layers, then pytest.
#
#   scripts/test.sh [--parity] [--fast] [--venv DIR] [--python PROGRAM] [-- PYTEST_ARGUMENTS...]
#
#   --parity   also the tests that compare with PyTorch, transformers' models and TRL
#   --fast     without the slow tests and without downloads: a minute or two
#
# The exit code is 0 only if every check passed. Pytest runs last, so that its summary is the last
# thing to read; checks that failed before it are listed above it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
parity=false fast=false setup=()

while (($#)); do
  case $1 in
    --parity) parity=true; shift ;;
    --fast) fast=true; shift ;;
    --venv | --python) setup+=("$1" "${2:?$1 needs a value}"); shift 2 ;;
    --) shift; break ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "test: error: unknown argument $1 (pytest's come after --)" >&2; exit 2 ;;
  esac
done

extras=dev
$parity && extras=dev,parity
python=$(bash scripts/setup.sh --extra "$extras" ${setup[@]+"${setup[@]}"} | tail -n 1)
bin=$(dirname "$python")

$fast || "$python" scripts/assets.py glassllm smollm2 imdb >/dev/null

failed=()
check() {
  local name=$1 started=$SECONDS
  shift
  if "$@"; then
    echo "$name: passed in $((SECONDS - started)) s"
  else
    echo "$name: FAILED in $((SECONDS - started)) s"
    failed+=("$name")
  fi
}
check "ruff check" "$bin/ruff" check .
check "ruff format" "$bin/ruff" format --check .
check "mypy" "$bin/mypy"
check "import-linter" "$bin/lint-imports" --no-cache

marks=""
$parity || marks="not parity"
$fast && marks="${marks:+$marks and }not slow and not assets"

if ((${#failed[@]})); then
  echo "test: FAILED before pytest: $(IFS=,; echo "${failed[*]}")"
fi
# One file stays on one worker: its compiled functions and loaded models are shared by its tests.
status=0
"$python" -m pytest -n "${JRLHF_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder ${marks:+-m "$marks"} "$@" || status=$?
((status)) || ((${#failed[@]} == 0)) || status=1
exit "$status"
