#!/usr/bin/env bash
# Run the notebook that reads a run, and write what it shows as a page for a browser:
#   bash jobs/notebook.sh                                      # the newest run
#   TREERPO_RUN=~/treerpo_runs/quickstart bash jobs/notebook.sh
# The page lies in the run folder. To change the notebook open notebooks/02_read_a_run.ipynb instead.
set -euo pipefail
source "$(dirname "$0")/setup.sh" notebook
run=${TREERPO_RUN:-$(python -c '
from treerpo_ray.config.sections import RunConfig
from treerpo_ray.study.analysis import newest_run
print(newest_run(RunConfig().root))')}
run=$(cd "$TREERPO_STARTED_IN" && cd "$run" 2>/dev/null && pwd || echo "$run")
[ -f "$run/config.yaml" ] || give_up "TREERPO_RUN=$run is no run: it has no config.yaml"
echo "reading $run ..." >&2
# The kernel listens on this machine alone and asks for a key; it warns of that all the same.
TREERPO_RUN=$run python -m nbconvert --log-level ERROR --execute \
    --ExecutePreprocessor.startup_timeout=600 \
    --ExecutePreprocessor.extra_arguments=--IPKernelApp.log_level=ERROR \
    --to html --output-dir "$run" --output read_a_run.html notebooks/02_read_a_run.ipynb
echo "$run/read_a_run.html"
