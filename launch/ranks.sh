#!/usr/bin/env bash
# Two processes on this machine, on GPUs where there are any (one if there is one GPU). Sourced after setup.sh; gives
# $processes and on_ranks SCRIPT [options], which starts a script on that many ranks.

export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
processes=$(python -c 'import torch; print(min(2, torch.cuda.device_count()))')
if [ "$processes" = 0 ]; then
  processes=2 cores=$(nproc)
  export DS_ACCELERATOR=cpu OMP_NUM_THREADS=$((cores > 3 ? cores / 2 : 1))
fi

on_ranks() {
  local port
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  deepspeed --log_level error --master_port "$port" --num_accelerators "$processes" "$@"
}
