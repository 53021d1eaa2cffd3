#!/usr/bin/env bash
# From a bare machine with Python 3.11 to a trained small model, on two cores, in minutes:
#   bash jobs/quickstart.sh
#   bash jobs/quickstart.sh run.seed=1      # another run, named quickstart-seed=1
# The last line on stdout is the result as JSON; everything else goes to stderr.
set -euo pipefail
source "$(dirname "$0")/setup.sh" cpu
exec python jobs/train.py conf/quickstart.yaml "$@"
