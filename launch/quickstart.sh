#!/usr/bin/env bash
# From raw text to an evaluated MO-CTE model: set-up, tokenizer, data, training on 2 processes, export, evaluation, report.
# About 5 minutes on two CPU cores after the set-up. What is there already is used again; an interrupted run goes on. After the
# set-up it is tools/quickstart.py, which an installed package starts by `mocte-ds quickstart`.
#
#   bash launch/quickstart.sh [--fresh] [--out DIR] [options of launch/pretrain.py, e.g. --set training.steps=100]
#
#   --fresh     remove the earlier run first; refused where the folder holds anything else
#   --out DIR   the run's folder (default: runs/quickstart)
#   EVAL_LIMIT  items of each evaluation task (default: all)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case " $* " in
  *" -h "* | *" --help "*) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac

. launch/setup.sh
exec python tools/quickstart.py "$@"
