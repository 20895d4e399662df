#!/usr/bin/env bash
# One machine, a rank for each of its GPUs (GPUS=2: for two of them; on a machine without, as many processes).
#
#     launch/node.sh configs/paper-1.4b-linear.toml out=runs/1.4b data.images=FOLDER data.text=FOLDER data.tokenizer=FILE
#
# Where a rank fails, torchrun starts all of them again, RESTARTS times at most, from the newest checkpoint. Ctrl-C, or
# a SIGTERM, ends after the step with a checkpoint; the same command goes on from it.
set -euo pipefail

exec torchrun \
  --standalone --nproc-per-node "${GPUS:-gpu}" \
  --max-restarts "${RESTARTS:-3}" --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout "${GRACE:-110}" \
  -m transfusion.cli train "$@" --resume
