#!/usr/bin/env bash
# Several machines without a scheduler: the same command on each of them, at about the same time.
#
#     NODES=4 HEAD=10.0.0.1 launch/nodes.sh configs/paper-7b-linear.toml out=/shared/runs/7b data.tokenizer=FILE ...
#
# HEAD is one of the machines, by an address that all of them reach at PORT; ID tells this run from others there. The
# run's folder, the data and the cache (TRANSFUSION_CACHE) are to be on storage that all of them share. Where a rank or
# a machine fails, HEAD apart, the others wait for it to come back, and all go on from the newest checkpoint.
set -euo pipefail

: "${NODES:?how many machines}" "${HEAD:?the address of one of them}"

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a new meeting place after each restart: parallel.py says why

exec torchrun \
  --nnodes "$NODES" --nproc-per-node "${GPUS:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${ID:-transfusion}" \
  --max-restarts "${RESTARTS:-3}" --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout "${GRACE:-110}" \
  -m transfusion.cli train "$@" --resume
