#!/usr/bin/env bash
# The first quarter of an hour on a GPU: what it is, whether attention, learner, engine and whole runs
# do on it what they do on a CPU, how fast, and in how much memory. Nothing is downloaded.
#   bash jobs/first_gpu_run.sh                        # all parts
#   bash jobs/first_gpu_run.sh machine model attention learner sharded   # these need no Ray or vLLM
#   bash jobs/first_gpu_run.sh --rehearse             # the same code on a CPU, in tiny sizes
# Time on one GPU of 80 GB: at most 15 minutes, which is what the parts' limits add up to, and about
# 12 as reckoned from the work in each (no GPU has measured it). Two GPUs or more make up to four
# runs of `options` in place of one: at most 8 minutes more. Five parts without Ray and vLLM and
# three with them, in the same $OUT, are two commands of less than 8 minutes each on one GPU.
# Each part writes PART.json and PART.log into $OUT (a new folder if it is not set); PATIENCE=3 triples
# its time, for slow disks. The last line on stdout is the verdict as JSON. Status: 0 all well, 1 a
# part failed, 2 no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
rehearse=()
if [ "${1:-}" = --rehearse ]; then
    rehearse=(--rehearse)
    shift
elif ! nvidia-smi -L >/dev/null 2>&1; then
    echo "error: nvidia-smi finds no GPU here; --rehearse runs the same on a CPU" >&2
    exit 2
fi
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
echo "results: $out" >&2
export HF_HUB_OFFLINE=1 WANDB_MODE=offline VLLM_NO_USAGE_STATS=1
declare -A limit_s=([machine]=20 [model]=40 [attention]=80 [learner]=100 [sharded]=170 [engine]=180 [train]=180 [options]=110)
if [ "$(nvidia-smi -L 2>/dev/null | wc -l)" -gt 1 ]; then
    limit_s[options]=590 # four whole runs, before one of which vLLM may have kernels made
fi
if [ $# -eq 0 ]; then
    set -- machine model attention learner sharded engine train options
fi
for part in "$@"; do
    if [ -z "${limit_s[$part]:-}" ]; then
        echo "error: no part is called $part; there are ${!limit_s[*]}" >&2
        exit 2
    fi
    echo "$part, at most ${limit_s[$part]} s ..." >&2
    rm -f "$out/$part.json"
    timeout --kill-after=5 "$((${limit_s[$part]} * ${PATIENCE:-1}))" \
        "${PYTHON:-python}" jobs/gpu/first_run.py "$part" "$out" "${rehearse[@]}" \
        >"$out/$part.log" 2>&1 </dev/null
done
exec "${PYTHON:-python}" jobs/gpu/first_run.py verdict "$out" "$@"
