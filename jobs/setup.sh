# Sourced by the other scripts with extras as $1: has an environment hold this project with them.
#   TREERPO_VENV names it, else it is the active one if treerpo_ray is installed there, else .venv
# What is there already is not installed again, whichever script brought it. The GPU build of vLLM is
# never put over the CPU build, nor the other way round, and a treerpo_ray that is installed from
# another folder stays so: then this folder is taken by PYTHONPATH.
extras=$1
export TREERPO_STARTED_IN=${TREERPO_STARTED_IN:-$PWD}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Error $1, and the end.
give_up() {
    echo "error: $1" >&2
    exit 2
}

# Whether $1 is a Python that the project runs on.
fits() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null
}

# Makes the environment, with whatever Python there is for it.
make_venv() {
    local python
    if [ -n "${PYTHON:-}" ]; then
        fits "$PYTHON" || give_up "$PYTHON is not Python 3.11; set PYTHON to one that is"
    fi
    for python in ${PYTHON:+"$PYTHON"} python3.11 python3; do
        if fits "$python"; then
            "$python" -m venv "$venv" || give_up "$python cannot make $venv; on Debian and Ubuntu: \
sudo apt install python3.11-venv"
            return
        fi
    done
    if command -v uv >/dev/null; then
        uv venv --quiet --seed --python 3.11 "$venv" >&2 || give_up "uv could not make $venv"
        return
    fi
    give_up "Python 3.11 is needed and not here. Get it by uv (curl -LsSf \
https://astral.sh/uv/install.sh | sh), pyenv (pyenv install 3.11) or apt (sudo add-apt-repository \
ppa:deadsnakes/ppa && sudo apt install python3.11-venv) and call this again, or set PYTHON"
}

# What pip is at by its log $1: of the packages that it installs, which it does without a word, how
# many are there.
progress() {
    local all there
    if grep -q '^compiling' "$1" || ! all=$(grep -m 1 '^Installing collected packages' "$1"); then
        tail -n 1 "$1" | sed 's/^ *//'
        return
    fi
    all=$(tr -cd , <<<"$all" | wc -c)
    there=$(find "$venv"/lib/python*/site-packages -maxdepth 1 -name '*.dist-info' | wc -l)
    echo "installing: $((there > all ? all + 1 : there)) of about $((all + 1)) packages are there"
}

# vLLM's CPU build brings them for CUDA, where they do not fit; text models need none of them.
take_away() {
    "$venv/bin/python" -m pip --quiet --disable-pip-version-check uninstall --yes \
        torchvision torchaudio torchcodec
}

# pip install with these arguments; every few seconds a line says what it is at.
install() {
    local log=$venv/setup.log ticker status=0 start=$SECONDS
    (
        while sleep "${TREERPO_TICK_S:-5}" && kill -0 $$ 2>/dev/null; do
            printf '%5d s: %.68s\n' $((SECONDS - start)) "$(progress "$log")" >&2
        done
    ) &
    ticker=$!
    # It is compiled below, on all cores.
    "$venv/bin/python" -m pip --disable-pip-version-check install --progress-bar off --no-compile "$@" \
        >"$log" 2>&1 || status=$?
    # Before anything that takes time: what is cut short would leave an environment without use.
    if [ "$status" = 0 ] && [[ $extras == *cpu* ]]; then
        take_away >>"$log" 2>&1 || status=$?
    fi
    if [ "$status" = 0 ]; then
        echo "compiling what was installed" >>"$log"
        # Else, where bytecode is not to be written, every process of a run compiles what it
        # imports, each time. Some files are for other Pythons and do not compile.
        "$venv/bin/python" -m compileall -q -j 0 "$venv/lib" >/dev/null 2>&1 || true
    fi
    kill "$ticker" 2>/dev/null
    wait "$ticker" 2>/dev/null || true
    if [ "$status" != 0 ]; then
        tail -n 5 "$log" >&2
        give_up "pip could not install $extras into $venv; all that it said is in $log"
    fi
    echo "installed in $((SECONDS - start)) s" >&2
}

venv=${TREERPO_VENV:-}
if [ -z "$venv" ]; then
    venv=.venv
    if [ -n "${VIRTUAL_ENV:-}" ] && "$VIRTUAL_ENV/bin/python" -c 'import importlib.metadata as m
m.distribution("treerpo_ray")' 2>/dev/null; then
        venv=$VIRTUAL_ENV
    fi
fi
if [ ! -x "$venv/bin/python" ]; then
    echo "making $venv ..." >&2
    make_venv
fi
state=$("$venv/bin/python" -I jobs/requirements.py "$extras") || give_up \
    "$venv has no Python that can read pyproject.toml: remove it, or set TREERPO_VENV to another"
# The lines of the state that begin with $1, without it.
of_state() {
    sed -n "s/^$1\t*//p" <<<"$state"
}
missing=$(of_state missing)
elsewhere=$(of_state elsewhere)
other=$(of_state python)
[ -z "$other" ] || give_up "$venv has Python $other, and the project runs on 3.11: set TREERPO_VENV to \
another folder, or remove it"
other=$(of_state holds)
[ -z "$other" ] || give_up "$venv holds ${other%%$'\t'*}, which ${other##*$'\t'} would overwrite: set \
TREERPO_VENV to another folder, such as .venv-${extras%%,*}, or remove $venv"
if [ -n "$elsewhere" ]; then
    [ -z "$missing" ] || give_up "$venv has treerpo_ray of $elsewhere and lacks $(paste -sd ' ' \
        <<<"$missing"): install that there, or set TREERPO_VENV to a folder of its own"
    echo "$venv stays that of $elsewhere; this folder is used by PYTHONPATH" >&2
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
elif [ -n "$missing" ] || grep -q '^absent' <<<"$state"; then
    echo "installing $extras into $venv (a few minutes the first time) ..." >&2
    index=()
    if [[ $extras == *cpu* ]] && ! "$venv/bin/python" -m pip --quiet --disable-pip-version-check \
        install --dry-run --no-deps 'torch==2.13.0+cpu' >/dev/null 2>&1; then
        index=(--extra-index-url https://download.pytorch.org/whl/cpu)
    fi
    install "${index[@]}" --editable ".[$extras]"
elif grep -q '^unfit' <<<"$state"; then
    take_away >&2  # an installation was cut short
fi
# A run is a dozen processes that import the same files: the project's own are compiled once, too.
unset PYTHONDONTWRITEBYTECODE
export PATH="$(cd "$venv" && pwd)/bin:$PATH"
