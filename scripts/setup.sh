#!/usr/bin/env bash
# Makes a virtual environment and installs jrlhf into it, with what fits this machine.
#
#   scripts/setup.sh [--extra NAME[,NAME...]] [--venv DIR] [--python PROGRAM] [--machine cpu|cuda|tpu]
#
# Needs Python >= 3.11 with pip and venv; nothing is compiled. A second call does nothing unless
# pyproject.toml, the extras or the interpreter changed. Prints the environment's python as its
# last line. Pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) apply.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras="" venv="$root/.venv" python="" machine=""

usage() { sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
fail() { echo "setup: error: $*" >&2; exit 2; }
say() { echo "setup: $*" >&2; }

while (($#)); do
  case $1 in
    --extra) extras=${2:?--extra needs names}; shift 2 ;;
    --venv) venv=${2:?--venv needs a directory}; shift 2 ;;
    --python) python=${2:?--python needs a program}; shift 2 ;;
    --machine) machine=${2:?--machine needs cpu, cuda or tpu}; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; fail "unknown argument $1" ;;
  esac
done

# A name on PATH may be a shim that fails, an interpreter too old, or one without pip and venv.
fits() {
  "$1" -c 'import sys, venv, ensurepip
sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in python3 python3.12 python3.13 python3.11 python; do
    if fits "$candidate"; then command -v "$candidate"; return; fi
  done
  return 1
}

find_machine() {
  local device
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    echo cuda; return
  fi
  # A TPU shows as a Google PCI device with one of these ids (v2 to v7).
  for device in /sys/bus/pci/devices/*; do
    if [[ $(cat "$device/vendor" 2>/dev/null) == 0x1ae0 ]]; then
      case $(cat "$device/device" 2>/dev/null) in
        0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076) echo tpu; return ;;
      esac
    fi
  done
  echo cpu
}

[[ -n $machine ]] || machine=$(find_machine)
[[ $machine =~ ^(cpu|cuda|tpu)$ ]] || fail "--machine is $machine; there are cpu, cuda and tpu"
if [[ -x $venv/bin/python && -z $python ]] && fits "$venv/bin/python"; then
  interpreter=$venv/bin/python
else
  if [[ -n $python ]]; then
    fits "$python" || fail "$python is not a Python 3.11 to 3.13 with pip and venv"
  else
    python=$(find_python) || fail "no Python 3.11 to 3.13 with pip and venv on PATH
  Fix: install one (Debian: python3 and python3-venv), or name it with --python."
  fi
  interpreter=$python
fi
version=$("$interpreter" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
all=$machine${extras:+,$extras}

stamp=$venv/.jrlhf-installed
wanted="$version $all $root $("$interpreter" - "$root/pyproject.toml" "${BASH_SOURCE[0]}" <<'PYTHON'
import hashlib, sys
print(hashlib.sha256(b"".join(open(path, "rb").read() for path in sys.argv[1:])).hexdigest())
PYTHON
)"
if [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  echo "$venv/bin/python"
  exit 0
fi

started=$SECONDS
if [[ ! -x $venv/bin/python ]] || [[ $("$venv/bin/python" -c \
  'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) != "$version" ]]; then
  say "making $venv with Python $version"
  "$interpreter" -m venv --clear "$venv"
fi
rm -f "$stamp"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --require-virtualenv)
# Wheels of everything exist: a source build would mean a compiler.
install=("${pip[@]}" install --quiet --prefer-binary)
if [[ ,$extras, == *,parity,* ]]; then
  # Alone and first, so that pip settles on this build (a CPU build where the index offers one)
  # before trl and peft ask for just any torch. On Linux the default build brings CUDA libraries;
  # point PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS at CPU wheels to spare the gigabytes.
  torch=$(grep -oE 'torch==[0-9.]+' "$root/pyproject.toml" | head -n 1)
  say "installing $torch, the oracle of the parity tests"
  "${install[@]}" "$torch"
fi
say "installing jrlhf[$all] with Python $version into $venv"
"${install[@]}" -e "$root[$all]"
"${pip[@]}" check >&2 || say "pip check found the conflicts above; going on"
echo "$wanted" >"$stamp"
say "ready after $((SECONDS - started)) s"
echo "$venv/bin/python"
