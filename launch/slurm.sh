#!/bin/bash
#SBATCH --job-name=@name@
#SBATCH --nodes=@nodes@
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=@gpus@
#SBATCH --signal=B:USR1@@notice@
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out@options@
# run_node is called on the nodes, and what stands in single quotes is meant to stay as it is.
# shellcheck disable=SC2016,SC2089,SC2090,SC2317
set -u

@variables@

@node@

job=$SLURM_JOB_ID
master_addr=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
master_port=$((20000 + job % 12000))
script=$(as_script)

echo "$(date -Is) job $job, start $((1 + ${SLURM_RESTART_COUNT:-0})), on $SLURM_JOB_NODELIST"
echo "logs of the ranks: $directory, $logs"

# When one node has ended, the others have a minute to save. What srun returns is the highest of their
# codes, and that of one that had to be killed is higher than any of ours: the first node's counts.
first_said() {
  cd "$directory" && cat "$logs/code-$job" 2> /dev/null && rm -f "$logs/code-$job"
}
(first_said) > /dev/null # of an earlier start
srun --ntasks-per-node=1 --cpu-bind=none --wait=60 bash -c "$script
  run_node \"\$SLURM_NODEID\"
  code=\$?
  [ \"\$SLURM_NODEID\" != 0 ] || echo \"\$code\" > \"\$logs/code-\$job\"
  exit \"\$code\"" &
step=$!
cancelled=""
trap 'kill -USR1 "$step"' USR1 # the time is nearly up; srun passes it on to every node
trap 'cancelled=yes' TERM      # scancel, which reaches the nodes by itself
await "$step"
code=$?
said=$(first_said)
[ "${said:-0}" = 0 ] || code=$said
echo "$(date -Is) exit code $code"
if [ "$code" = 75 ] && [ -z "$cancelled" ]; then
  scontrol requeue "$job"
fi
exit "$code"
