# Sourced by the other scripts: makes a virtual environment if there is none, installs the package there and activates it.
#   install_into_venv EXTRAS [FOLDER CONSTRAINTS]     e.g. install_into_venv '[dev]'

install_into_venv() {
    local python=${PYTHON:-python3} folder=${2:-.venv} constraints=${3:-constraints.txt}
    if [ ! -x "$folder/bin/python" ]; then
        echo "Making $folder with $($python --version)"
        "$python" -m venv "$folder"
    fi
    # shellcheck disable=SC1091
    . "$folder/bin/activate"
    if ! python -m pip install --quiet --disable-pip-version-check -c "$constraints" -e ".$1"; then
        echo "The install failed; see pip's message above." >&2
        return 1
    fi
}
