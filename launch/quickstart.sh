#!/usr/bin/env bash
# From raw text to an evaluated MO-CTE model: set-up, tokenizer, data, training on 2 processes, export, evaluation, report.
# About 5 minutes on two CPU cores after the set-up. What is there already is used again; an interrupted run goes on.
#
#   bash launch/quickstart.sh [--fresh] [--out DIR] [options of launch/pretrain.py, e.g. --set training.steps=100]
#
#   --fresh     remove the earlier run first; refused where the folder holds anything else
#   --out DIR   the run's folder (default: runs/quickstart)
#   EVAL_LIMIT  items of each evaluation task (default: all)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=runs/quickstart fresh=0 options=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --fresh) fresh=1 ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    *) options+=("$1") ;;
  esac
  shift
done

. launch/setup.sh
. launch/ranks.sh
if [ "$fast_bf16" = 0 ]; then
  echo "this CPU has no instructions for bf16: training in fp32"
  options=(--set deepspeed.bf16.enabled=false ${options[@]+"${options[@]}"})
fi
[ "$processes" -gt 1 ] || options+=(--set deepspeed.mocte.ep_size=1)
step() { printf '\n[%s] %s\n' "$1" "$2"; }

started=$SECONDS
if [ "$fresh" = 1 ]; then python -m mocte_ds.ownership "$out"; fi

step 1/6 "tokenizer"
python tools/train_tokenizer.py --out "$out/tokenizer.model" --vocab-size 2048 --if-missing
step 2/6 "data"
python tools/prepare_data.py --out "$out/data" --tokenizer "$out/tokenizer.model"
step 3/6 "training on $processes processes"
on_ranks launch/pretrain.py --run launch/runs/quickstart.yaml --out "$out" --set "data.prepared=$(quoted "$out/data")" \
  ${options[@]+"${options[@]}"}
step 4/6 "export to Hugging Face format"
if [ "$out/export/export.json" -nt "$out/checkpoints/latest" ]; then
  echo "found $out/export"
else
  python tools/export_hf.py "$out/checkpoints" "$out/export"
fi
step 5/6 "lm-evaluation-harness: one task of classification, one of generation"
if [ "$out/evaluation/results.json" -nt "$out/export/export.json" ]; then
  echo "found $out/evaluation/results.json"
else
  on_ranks launch/evaluate.py "$out/export" --tasks openbookqa_offline,commonsense_qa_generate \
    ${EVAL_LIMIT:+--limit "$EVAL_LIMIT"} --output "$out/evaluation/results.json"
fi
step 6/6 "report"
python tools/report.py "$out"

cat <<END

done in $((SECONDS - started)) s. Everything is in $out:
  report/index.html         what happened, with pictures
  export/                   the model in Hugging Face format
  evaluation/results.json   lm-eval's numbers
  metrics.jsonl             a line a step;  events.jsonl: checks, emergence, freezing;  run.json: all settings
  checkpoints/              to go on training;  tensorboard/: for tensorboard --logdir $out/tensorboard
END
