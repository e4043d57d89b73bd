# What every node does: one launcher, which starts a rank for each GPU.

# Like wait, but a trap that runs meanwhile does not end it.
await() {
  local code
  wait "$1"
  code=$?
  while [ "$code" -gt 128 ] && kill -0 "$1" 2> /dev/null; do
    wait "$1"
    code=$?
  done
  if [ "$code" -gt 128 ]; then # it may have ended while the trap ran
    wait "$1"
    code=$?
  fi
  return "$code"
}

# Like sleep, for a subshell: none is left behind when that is killed.
doze() {
  sleep "$1" &
  # shellcheck disable=SC2064
  trap "kill -KILL $!; exit" TERM # it may have been started deaf to others
  wait "$!"
}

# Ask all of this process group to stop, and again, as a rank that still imports hears nothing.
stop_ranks() {
  trap '' USR1 USR2 TERM
  (while kill -0 "$launched" 2> /dev/null && kill -USR1 0; do doze 10; done) &
  asking=$!
}

load_modules() {
  local file
  set +u
  for file in /etc/profile.d/{modules,lmod,z00_lmod}.sh; do
    # shellcheck disable=SC1090
    command -v module > /dev/null || [ ! -r "$file" ] || . "$file"
  done
  module load "$@"
}

# Return the exit code of the launcher; 75 means: saved, run again. Sets `deleted` where USR2 says that
# the job will be killed (Grid Engine).
run_node() { # number of the node, from 0
  local node=$1 rank=$(($1 * gpus)) asking="" early="" launched code
  trap 'early=yes' USR1 TERM
  trap 'early=yes deleted=yes' USR2
  cd "$directory" && mkdir -p "$logs" && echo "$$" > "$logs/node$node-$job.pid" || return 2
  if [ "${#modules[@]}" -gt 0 ]; then
    load_modules "${modules[@]}" || return 2
  fi
  if [ -n "$scratch" ]; then
    # A login that was saved stays where it is; the words are expanded before HF_HOME changes.
    export HF_TOKEN_PATH=${HF_TOKEN_PATH:-${HF_HOME:-$HOME/.cache/huggingface}/token} \
      HF_HOME=${HF_HOME:-$scratch/huggingface} TMPDIR=$scratch/tmp-$job-$node
    mkdir -p "$HF_HOME" "$TMPDIR" || return 2
  fi
  (
    # The launcher would die of these, and lose the code. Its ranks set handlers of their own.
    trap '' USR1 USR2 TERM INT
    exec "${launcher[@]}" -n "$gpus" --world_size "$((nodes * gpus))" --node_rank "$node" \
      --master_addr "$master_addr" --master_port "$master_port" \
      --stdout "$rank_logs.out" --stderr "$rank_logs.err" "${command[@]}" \
      < /dev/null >> "$logs/rank$rank.out" 2>> "$logs/rank$rank.err"
  ) &
  launched=$!
  trap stop_ranks USR1 TERM
  trap "deleted=yes; stop_ranks" USR2
  [ -z "$early" ] || { sleep 1 && stop_ranks; } # until what is launched is deaf to it
  await "$launched"
  code=$?
  trap '' USR1 USR2 TERM
  [ -z "$asking" ] || kill "$asking" 2> /dev/null
  [ -z "$scratch" ] || rm -rf -- "$TMPDIR"
  rm -f "$logs/node$node-$job.pid"
  return "$code"
}

# All of this, and what it needs to know, as text for the bash of another node.
as_script() {
  declare -f await doze stop_ranks load_modules run_node
  declare -p directory logs rank_logs nodes gpus launcher command modules scratch
  declare -p job master_addr master_port
}
