#!/usr/bin/env bash
# Shows that the wheel works where there is no checkout: a new environment, an empty folder, the examples copied there.
#
#     bash tests/outside/run.sh [FOLDER]          (default: a new folder under ${TMPDIR:-/tmp}; some GB)
#
# PYTHON names another interpreter, MOCTE_TORCH words for pip that install torch before the rest (torch==2.13.0, say,
# where this fetches a CPU build). DEPENDENCIES names a folder of site-packages whose packages are used, mocte_ds
# excepted, instead of downloading them. STAGE=readme runs the first stage alone, STAGE=tools the rest.
#
# README's script on two ranks, in an environment of the wheel without extras, where transformers is not installed. Then
# Trainer and accelerate on two ranks with emergence, freezing, an interruption in the middle and an export; then GPT2,
# Qwen3, Gemma3, Phi3, GPT-NeoX and OPT by mocte_ds.initialize alone. Ends with "all of it works", or with what did not.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=${1:-$(mktemp -d "${TMPDIR:-/tmp}/mocte-outside-XXXXXX")}
python=${PYTHON:-python3}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

unset PYTHONPATH
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export TORCH_EXTENSIONS_DIR=$folder/torch_extensions
fail() { echo "FAILED: $1" >&2; exit 1; }
has() { grep -Eq "$2" "$1.log" || { tail -n 30 "$1.log"; fail "$1.log has no line like $2"; }; }
launch() { "$@" > "$name.log" 2>&1 || { tail -n 30 "$name.log"; fail "$name"; }; }
on_two() { deepspeed --log_level error --num_accelerators 2 "$@"; }
require_ours() {
  local place
  place=$(python -c 'import mocte_ds; print(mocte_ds.__file__)')
  [[ $place == "$1"/* ]] || fail "mocte_ds is that of $place"
}
with_torch() {
  "$python" -m venv "$1"
  # shellcheck disable=SC2086  several words on purpose
  if [ -n "${MOCTE_TORCH:-}" ]; then "$1/bin/pip" install --quiet $MOCTE_TORCH; fi
}

if [ ! -d "$folder/wheel" ]; then
  "$python" -m venv "$folder/building"
  # From a copy: building writes into the folder that it builds.
  mkdir "$folder/source"
  git -C "$root" archive HEAD | tar -x -C "$folder/source"
  "$folder/building/bin/pip" wheel --quiet --no-deps --wheel-dir "$folder/wheel" "$folder/source"
fi
wheel=$(echo "$folder"/wheel/mocte_ds-*.whl)

if [ "${STAGE:-readme}" = readme ] && [ -z "${DEPENDENCIES:-}" ]; then
  if [ ! -x "$folder/plain/bin/mocte-ds" ]; then
    with_torch "$folder/plain"
    "$folder/plain/bin/pip" install --quiet "$wheel"
  fi
  ( PATH=$folder/plain/bin:$PATH
    rm -rf "$folder/readme" && mkdir "$folder/readme"
    cd "$folder/readme"
    require_ours "$folder/plain"
    if python -c 'import transformers' 2> import.log; then fail "transformers is there without any extra"; fi
    grep -q "No module named 'transformers'" import.log || { cat import.log; fail "transformers is there, and broken"; }
    sed -n '/^<!-- the test suite runs this script/,/^```$/p' "$root/README.md" | sed '1,2d;$d' > script.py
    name=readme
    launch on_two script.py
    has $name '[0-9]+ emergence '
    has $name 'loss [0-9][.][0-9]+, experts of block 0'
    grep -E 'emergence|loss' $name.log )
  echo "README's script trains in an environment without extras"
fi
[ "${STAGE:-tools}" = tools ] || exit 0

if [ ! -x "$folder/venv/bin/mocte-ds" ]; then
  with_torch "$folder/venv"
  site=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  offline=()
  if [ -n "${DEPENDENCIES:-}" ]; then
    # Behind the environment's own packages; lines of .pth files there (a checkout) do not count.
    echo "$DEPENDENCIES" > "$site/dependencies.pth"
    printf '#!/bin/sh\nexec "%s" -m accelerate.commands.accelerate_cli "$@"\n' "$folder/venv/bin/python" > "$folder/venv/bin/accelerate"
    printf '#!/bin/sh\nexec "%s" -m deepspeed.launcher.runner "$@"\n' "$folder/venv/bin/python" > "$folder/venv/bin/deepspeed"
    chmod +x "$folder"/venv/bin/{accelerate,deepspeed}
    offline=(--no-deps)
  fi
  "$folder/venv/bin/pip" install --quiet "${offline[@]}" "$wheel[trainer,report]"
fi
PATH=$folder/venv/bin:$PATH
rm -rf "$folder/work" && mkdir "$folder/work"
cp "$root"/examples/{trainer,accelerate_loop}.py "$root/tests/outside/families.py" "$folder/work"
cd "$folder/work"

require_ours "$folder/venv"

name=trainer-before
launch on_two trainer.py --out trainer --steps 40 --stop-after 16
has $name '^[0-9]+ emergence '
name=trainer-after
launch on_two trainer.py --out trainer --steps 40
has $name '^[0-9]+ freeze '
has $name "'frozen'"
has $name 'MocteBlocksForCausalLM .* differ by at most (0[.]0e[+]00|[0-9.]+e-(0[5-9]|[1-9]))'

name=accelerate-before
launch accelerate launch --use_deepspeed --num_machines 1 --mixed_precision no --dynamo_backend no --num_processes 2 \
  accelerate_loop.py --out accelerate --steps 16
has $name '^[0-9]+ emergence '
name=accelerate-after
launch accelerate launch --use_deepspeed --num_machines 1 --mixed_precision no --dynamo_backend no --num_processes 2 \
  accelerate_loop.py --out accelerate
has $name '^[0-9]+ freeze '
has $name "'frozen'"
has $name 'MocteBlocksForCausalLM .* differ by at most (0[.]0e[+]00|[0-9.]+e-(0[5-9]|[1-9]))'

name=families
launch python families.py families
for kind in gpt2 qwen3 gemma3_text phi3 gpt_neox opt; do has $name "^$kind: .* differ by"; done
cat families.log

mocte-ds report trainer accelerate --out report > /dev/null
[ -s report/index.html ] || fail "no report"
echo "all of it works in $folder"
