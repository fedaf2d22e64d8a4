#!/usr/bin/env bash
# Workers over a Slurm allocation: Ray's head on the first node, a Ray node on each, the fleet on the head.
#
#   AGENT=my_agent:agent AGL_GRPC_STORE=store-host:4747 sbatch --nodes=8 examples/deploy/ray-slurm.sh
#
# The environment with agl-grpc[ray] and your agent's folder have to be on a file system that all nodes share.
#SBATCH --job-name=agl-grpc-runner
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# The fleet is told two minutes before the end, so that it drains and nothing has to be done again.
#SBATCH --signal=B:TERM@120
set -euo pipefail

: "${AGENT:?set AGENT to your agent, for example my_agent:agent}"
: "${AGL_GRPC_STORE:?set AGL_GRPC_STORE to the address of the store, as the nodes reach it}"
workers=${WORKERS:-64}
cpus_per_worker=${CPUS_PER_WORKER:-2}
gpus_per_worker=${GPUS_PER_WORKER:-0}
port=${RAY_PORT:-6379}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{ print $1 }'):$port

# One step for each node: --block keeps it until the job ends, and Slurm ends what is left.
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
  ray start --head --node-ip-address="${address%:*}" --port="$port" --num-cpus="${SLURM_CPUS_PER_TASK:-1}" \
  --include-dashboard=false --disable-usage-stats --block &
steps=($!)
if ((${#nodes[@]} > 1)); then
  others=$(IFS=, && echo "${nodes[*]:1}")
  # Nodes try again until the head is there.
  srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --nodelist="$others" --overlap \
    ray start --address="$address" --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --disable-usage-stats --block &
  steps+=($!)
fi

until ray status --address="$address" > /dev/null 2>&1; do
  kill -0 "${steps[0]}" 2> /dev/null || { echo "error: Ray's head did not start on $head" >&2; exit 1; }
  sleep 2
done

# Before the fleet starts: from its first moment on, a signal is passed on to it and does not end this script.
fleet=''
signals=0
trap 'signals=$((signals + 1)); [[ -z "$fleet" ]] || kill -TERM "$fleet" 2> /dev/null || true' TERM INT
agl-grpc runner start --agent "$AGENT" --store "$AGL_GRPC_STORE" --ray --address "$address" \
  --workers "$workers" --cpus-per-worker "$cpus_per_worker" --gpus-per-worker "$gpus_per_worker" \
  --concurrency "${CONCURRENCY:-16}" --drain 90 &
fleet=$!
((signals == 0)) || kill -TERM "$fleet" 2> /dev/null || true
# A signal interrupts a wait: then the fleet, which drains or has ended by now, is waited for once more.
before=-1
while ((before != signals)); do
  before=$signals
  code=0
  wait "$fleet" || code=$?
done
kill "${steps[@]}" 2> /dev/null || true
wait || true
exit "$code"
