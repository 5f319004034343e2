#!/usr/bin/env bash
# One command on every worker of a TPU-VM pod slice, as processes of one job:
#
#   TPU=my-pod ZONE=us-east5-b launch/tpu/pod.sh run m6rec train --config 1b --dataset /mnt/data/shop --run /mnt/runs/shop
#   TPU=my-pod ZONE=us-east5-b launch/tpu/pod.sh stop       # SIGTERM to all of them: `train` saves and exits 75
#
# `run` stays until all have ended; every line begins with the number of its worker, and the exit code is that of the
# first that failed. SIGTERM and Ctrl-C here are a `stop` there. The command must be installed on all workers (`run pip
# install ...` does that), and folders must be on a file system that they share. PORT (8476) must be open between them.
# M6REC_ENV: a file of NAME=value lines for all workers (launch/env/tpu.env), empty for none.
set -euo pipefail
{ # bash reads this as a whole, so that the file may change while a job runs

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" >&2 && exit 2; }
[[ -n ${TPU:-} && -n ${ZONE:-} ]] || usage
note=.m6rec-$TPU.pid # on each worker, in its home: the process that runs there

on() { # on WORKER COMMAND: one line of shell on one worker
    gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker "$1" --quiet --command "$2"
}

ask() { gcloud compute tpus tpu-vm describe "$TPU" --zone "$ZONE" --format "$1"; }

first=$(ask 'value(networkEndpoints[0].ipAddress)')
count=$(ask 'value(networkEndpoints.len())')

stop() {
    set -m
    for ((i = 0; i < count; i++)); do on "$i" "kill -TERM \$(cat $note)" </dev/null & done
    set +m
}

case ${1:-} in
stop) stop && wait ;;
run)
    shift
    [[ $# -ge 1 ]] || usage
    settings=() flags=${M6REC_ENV-$(dirname "$0")/../env/tpu.env}
    while IFS= read -r line; do
        [[ $line != [A-Z]*=* ]] || settings+=("$line")
    done <"${flags:-/dev/null}"
    pids=()
    set -m # groups of their own: Ctrl-C reaches this script alone, not ssh, which would leave the worker running
    for ((i = 0; i < count; i++)); do
        own=("M6REC_COORDINATOR=$first:${PORT:-8476}" "M6REC_PROCESSES=$count" "M6REC_PROCESS_ID=$i" "${settings[@]}")
        # exec: the number noted is the command's own, and its exit code is what ssh ends with.
        on "$i" "echo \$\$ > $note; exec env ${own[*]@Q} ${*@Q}" \
            </dev/null > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
        pids+=($!)
    done
    set +m
    trap 'again=1; stop' TERM INT
    code=0
    for pid in "${pids[@]}"; do
        again=1
        while [[ -n $again ]]; do # a signal ends the wait, not the process; bash keeps the process's exit code
            its=0 again=''
            wait "$pid" || its=$?
        done
        if [[ $its -ne 0 && $code -eq 0 ]]; then code=$its; fi
    done
    wait || true
    exit "$code"
    ;;
*) usage ;;
esac
}
