#!/bin/bash
# Run by hand on any machine that reaches the nodes by ssh without a password: bash FILE
# run_node is called on the nodes, and what stands in single quotes is meant to stay as it is.
# shellcheck disable=SC2016,SC2089,SC2090,SC2317
set -u

@variables@

@node@

job=$$
master_addr=${hosts[0]#*@}
master_port=$((20000 + RANDOM % 12000))
script=$(
  as_script
  declare -p job "${!HF_@}" "${!HUGGINGFACE_@}" "${!WANDB_@}" "${!MLFLOW_@}" "${!AWS_@}" \
    "${!NCCL_@}" "${!GLOO_@}" "${!OMP_@}" "${!APPTAINER_@}" "${!OVERTURE_@}" "${!SCRATCH@}" \
    "${!S3_@}" "${!GOOGLE_@}" "${!GCS_@}" "${!AZURE_@}" "${!http@}" "${!HTTP@}" "${!no_proxy@}" \
    "${!NO_PROXY@}" "${!TORCH_@}" "${!PYTORCH_@}" "${!CUDA_VISIBLE@}"
)

on_node() { # number of the node, what to do there
  ssh -o BatchMode=yes "${hosts[$1]}" bash -s <<< "$script; $2"
}

stop() {
  echo "asking the ranks to save ..."
  on_node 0 'cd "$directory" && kill -USR1 "$(cat "$logs/node0-$job.pid")"'
}

echo "logs of the ranks: $directory, $logs"
for ((node = nodes - 1; node >= 0; node--)); do
  (
    trap '' INT USR1 TERM
    on_node "$node" "run_node $node"
  ) &
  first=$!
done
trap stop INT USR1 TERM
await "$first"
code=$?
trap '' INT USR1 TERM
wait
echo "exit code $code"
exit "$code"
