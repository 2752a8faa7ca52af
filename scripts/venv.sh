# Sourced by the other scripts: makes .venv if there is none, installs the package there and activates it.
#   install_into_venv [EXTRAS]     e.g. install_into_venv '[dev]'

install_into_venv() {
    local python=${PYTHON:-python3}
    if [ ! -x .venv/bin/python ]; then
        echo "Making .venv with $($python --version)"
        "$python" -m venv .venv
    fi
    # shellcheck disable=SC1091
    . .venv/bin/activate
    if ! python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$1"; then
        echo "The install failed; see pip's message above." >&2
        return 1
    fi
}
