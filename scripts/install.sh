# Sourced by quickstart.sh and test.sh: `install [dev]` makes .venv beside this folder, installs the package into it and activates it.
# The second time it finds everything in place and needs no network. pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) decide
# where packages come from; set them to an index with CPU builds of torch to save a large download on a machine without a GPU.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

is_supported() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in python3.11 python3 python3.12 python3.13 python3.14 python; do
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "Dragoman needs Python 3.11 or newer, and none is on the PATH" >&2
    return 1
}

# The wheel of Transformers leaves its tests out; tests/conformance runs them on our classes.
fetch_suite() {
    local suite version
    version=$(sed -n 's/^transformers==//p' scripts/constraints.txt)
    suite=.venv/transformers-$version
    if [ ! -d "$suite" ]; then
        echo "Fetching the tests of Transformers $version into .venv"
        rm -rf .venv/sdist
        .venv/bin/python -m pip download --quiet --no-deps --no-binary transformers --dest .venv/sdist "transformers==$version" || return 1
        tar -xzf ".venv/sdist/transformers-$version.tar.gz" -C .venv/sdist "transformers-$version/tests" || return 1
        mv ".venv/sdist/transformers-$version" "$suite"
        rm -r .venv/sdist
    fi
}

install() {
    local extra=${1:-} key python
    # What was installed, where and from which pins; a change of any of them installs again.
    key=$(cat pyproject.toml scripts/constraints.txt <(echo "$root") | cksum)
    if [ "$(cat .venv/installed-dev 2>/dev/null)" != "$key" ] && [ "$(cat ".venv/installed-${extra:-base}" 2>/dev/null)" != "$key" ]; then
        if ! is_supported .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
            python=$(find_python) || return 1
            echo "Making .venv with $("$python" --version)"
            "$python" -m venv --clear .venv || {
                echo "$python cannot make a virtual environment; on Debian and Ubuntu, install python3-venv" >&2
                return 1
            }
        fi
        echo "Installing Dragoman and what it needs into .venv (a few minutes the first time)"
        rm -f .venv/installed-*
        .venv/bin/python -m pip install --quiet --constraint scripts/constraints.txt --editable ".${extra:+[$extra]}" || return 1
        echo "$key" >".venv/installed-${extra:-base}"
    fi
    if [ "$extra" = dev ]; then
        fetch_suite || return 1
    fi
    source .venv/bin/activate
}
