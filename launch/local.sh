#!/usr/bin/env bash
# Several processes of one job on this machine:
#
#   launch/local.sh 2 m6rec train --config small --dataset data/shop --run runs/shop      # over gloo, on the CPU
#   launch/local.sh gpus m6rec train --config base --dataset data/shop --run runs/shop    # one process a GPU
#   launch/local.sh 4 m6rec generate --run runs/shop --users all --out recs.parquet       # shard I of 4 each
#
# Every line of output begins with the number of its process. SIGTERM and Ctrl-C are passed on to all of them once
# (`train` then saves). The exit code is that of the first process that failed, 0 when none did; the others are told
# to end then, and killed GRACE seconds later.
set -euo pipefail
{ # bash reads this as a whole, so that the file may change while a job runs

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" >&2 && exit 2; }
[[ $# -ge 2 ]] || usage
count=$1 grace=${GRACE:-120}
shift
gpus=()
if [[ $count == gpus ]]; then
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    else
        readarray -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
    fi
    count=${#gpus[@]}
    [[ $count -gt 0 ]] || { echo "local.sh: no GPU found; give a number of processes instead of 'gpus'" >&2 && exit 2; }
fi
[[ $count =~ ^[1-9][0-9]*$ ]] || usage

port=$("${PYTHON:-python3}" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export M6REC_COORDINATOR=127.0.0.1:$port M6REC_PROCESSES=$count

prefixed() { # copies lines; ends with the process that writes them, not with a signal
    trap '' INT TERM HUP
    local line
    while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

set -m # processes in groups of their own: Ctrl-C reaches them through us alone, and is not ignored
pids=() writers=()
for ((i = 0; i < count; i++)); do
    exec {out}> >(prefixed "$i") && writers+=($!)
    exec {err}> >(prefixed "$i" >&2) && writers+=($!)
    (
        [[ ${#gpus[@]} -eq 0 ]] || export CUDA_VISIBLE_DEVICES=${gpus[i]}
        export M6REC_PROCESS_ID=$i
        exec "$@" >&"$out" 2>&"$err" {out}>&- {err}>&-
    ) &
    pids+=($!)
    exec {out}>&- {err}>&-
done
set +m # else Ctrl-C reaches only the `sleep` below, in a group of its own

code=0 deadline=0 told=
declare -A ended=()
tell() { # signal those that still run
    for pid in "${pids[@]}"; do [[ -n ${ended[$pid]:-} ]] || kill -s "$1" "$pid" 2>/dev/null || true; done
}
trap 'told=1; tell TERM' TERM HUP
trap 'told=1; tell INT' INT
while [[ ${#ended[@]} -lt $count ]]; do
    for pid in "${pids[@]}"; do
        [[ -z ${ended[$pid]:-} ]] || continue
        kill -0 "$pid" 2>/dev/null && continue
        its=0
        wait "$pid" || its=$?
        ended[$pid]=$its
        if [[ $its -ne 0 && $code -eq 0 ]]; then
            code=$its deadline=$((SECONDS + grace))
            [[ -n $told ]] || tell TERM # else they are ending already
        fi
    done
    if [[ $deadline -gt 0 && $SECONDS -ge $deadline ]]; then tell KILL; fi
    [[ ${#ended[@]} -eq $count ]] || sleep 0.1 || true
done
for ((i = 0; i < 20; i++)); do # until the last lines are out; something they left behind may hold on to them
    kill -0 "${writers[@]}" 2>/dev/null || break
    sleep 0.1
done
exit "$code"
}
