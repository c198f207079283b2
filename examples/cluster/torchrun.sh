#!/usr/bin/env bash
# Several machines, started by hand: run this on each of them, with the same values.
#
#   FIRST_HOST=10.0.0.1 ./torchrun.sh
#
# Begin with FIRST_HOST: the others wait a minute for it. A machine that leaves is done without as long as MIN_NODES
# remain; one that comes back is taken in. Either way torchrun starts the processes again, and they go on with the run:
# lost are the steps since its last checkpoint, and none where the machine was told to leave (SIGTERM).
set -euo pipefail

# ---- edit
RECIPE=${RECIPE:-first}                                 # a shipped recipe, or a .yaml file on the shared disk
RUN=${RUN:-/shared/runs/first}                          # on a disk that all machines share, each under this path
FIRST_HOST=${FIRST_HOST:?the address of one machine, as the others reach it}
PORT=${PORT:-29400}
MIN_NODES=${MIN_NODES:-1}
MAX_NODES=${MAX_NODES:-2}
PROCESSES=${PROCESSES:-gpu}                             # of each machine: a number, or one for each GPU
SHARD=${SHARD:-8}                                       # processes that share one copy of the weights
export DOUGONG_CACHE=${DOUGONG_CACHE:-/shared/cache}    # prepared data, shared too
LOCAL_ADDRESS=${LOCAL_ADDRESS:-}                        # this machine's, where the host name does not lead to it
# ----

more=()
if [[ -n $LOCAL_ADDRESS ]]; then
  more+=(--local-addr "$LOCAL_ADDRESS")
  if [[ $LOCAL_ADDRESS == "$FIRST_HOST" ]]; then more+=(--rdzv-conf is_host=1); else more+=(--rdzv-conf is_host=0); fi
fi

# A store of its own for each start of the processes; with torchrun's one for all, a machine cannot come back (2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300               # seconds between SIGTERM and SIGKILL, to finish a step and save

# The identity is the run's: a launch of the same identity goes on with the run that an earlier one began.
exec torchrun \
  --nnodes "$MIN_NODES:$MAX_NODES" --nproc-per-node "$PROCESSES" \
  --rdzv-backend c10d --rdzv-endpoint "$FIRST_HOST:$PORT" --rdzv-id "$(basename "$RUN")" \
  "${more[@]}" --max-restarts 10 \
  --module -- dougong train "$RECIPE" --run "$RUN" "layout.shard=$SHARD" "$@"
