#!/bin/bash
#$ -S /bin/bash
#$ -N run-@name@
#$ -cwd
#$ -j y
#$ -V
#$ -r y
#$ -notify@options@
# run_node is called on the nodes, and what stands in single quotes is meant to stay as it is.
# shellcheck disable=SC2016,SC2089,SC2090,SC2317
set -u

@variables@

@node@

job=$JOB_ID
mapfile -t hosts < <(awk '!seen[$1]++ { print $1 }' "${PE_HOSTFILE:-${SGE_JOB_HOSTLIST:-/dev/null}}")
[ "${#hosts[@]}" -gt 0 ] || hosts=("$(hostname)")
if [ "${#hosts[@]}" != "$nodes" ]; then
  echo "error: $nodes nodes were asked for, but this job has ${#hosts[@]}: ${hosts[*]}"
  exit 2
fi
master_addr=${hosts[0]}
master_port=$((20000 + job % 12000))
script=$(
  as_script
  declare -p job "${!HF_@}" "${!HUGGINGFACE_@}" "${!WANDB_@}" "${!MLFLOW_@}" "${!AWS_@}" \
    "${!NCCL_@}" "${!GLOO_@}" "${!OMP_@}" "${!APPTAINER_@}" "${!OVERTURE_@}" "${!SCRATCH@}" \
    "${!S3_@}" "${!GOOGLE_@}" "${!GCS_@}" "${!AZURE_@}" "${!http@}" "${!HTTP@}" "${!no_proxy@}" \
    "${!NO_PROXY@}" "${!TORCH_@}" "${!PYTORCH_@}" "${!JOB_ID@}"
)

echo "$(date -Is) job $job on ${hosts[*]}"
echo "logs of the ranks: $directory, $logs"

for ((node = 1; node < nodes; node++)); do
  (
    trap '' USR1 USR2 TERM
    exec ssh -o BatchMode=yes "${hosts[node]}" bash -s <<< "$script; run_node $node"
  ) &
done
if [ "$patience" -gt 0 ]; then # the time is nearly up: seconds from now
  (doze "$patience" && kill -USR1 "$$") &
  timer=$!
fi
# The ranks of one node tell all others. USR2 comes before a job that was deleted is killed.
run_node 0
code=$?
[ "$patience" = 0 ] || kill "$timer" 2> /dev/null
wait
echo "$(date -Is) exit code $code"
if [ "$code" = 75 ] && [ -z "$deleted" ]; then
  exit 99 # Grid Engine runs a job again that ends so
fi
exit "$code"
