#!/usr/bin/env bash
# Two processes on this machine, on GPUs where there are any (one if there is one GPU). Sourced after setup.sh; gives
# $processes, $fast_bf16 (0 on a CPU that has no instructions for bf16), on_ranks SCRIPT [options], which starts a script on
# that many ranks, and quoted TEXT, for values of --set.

export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
processes=$(python -c 'import torch; print(min(2, torch.cuda.device_count()))')
fast_bf16=1
if [ "$processes" = 0 ]; then
  # Without them a product in bf16 takes about twenty times as long as in fp32.
  fast_bf16=$(python -c 'import torch; print(int(torch.ops.mkldnn._is_mkldnn_bf16_supported()))' 2>/dev/null || echo 1)
  processes=2 cores=$(nproc)
  export DS_ACCELERATOR=cpu OMP_NUM_THREADS=$((cores > 3 ? cores / 2 : 1))
fi

on_ranks() {
  local port
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  deepspeed --log_level error --master_port "$port" --num_accelerators "$processes" "$@"
}

# As a value of --set, which is YAML: a name like 'a #1' or '[1]' must stay a name.
quoted() { python -c 'import json, sys; print(json.dumps(sys.argv[1]))' "$1"; }
