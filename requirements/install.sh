#!/bin/sh
# install.sh core|all|beam: makes $VENV hold what requirements/core.lock, all.lock or beam.lock says, and this checkout.
# beam.lock pins some packages a major version behind the others, so it never shares a folder with them.
#
# $VENV/locks notes what is installed, written once all of it is there. A second call only compares the note; a folder
# without a note was left half-made and is made again from nothing. Without PY a good .venv keeps its interpreter; with
# PY, another interpreter means another .venv.
set -eu
cd "$(dirname "$0")/.."
what=$1 VENV=${VENV:-.venv} PY=${PY:-}
python=$VENV/bin/python

identity() { "$1" -I -c 'import sys; print(sys.version.split()[0], sys.base_prefix)' 2>/dev/null || echo none; }
locks() { echo "$PWD $(identity "$python")" && for name in "$@"; do cksum "requirements/$name.lock"; done; }
holds() { [ -f "$VENV/locks" ] && [ "$(cat "$VENV/locks")" = "$(locks "$@")" ]; }
note() { cat >"$VENV/.partial" && mv "$VENV/.partial" "$1"; }
remove() { rm -f "$VENV/locks" && rm -rf "$VENV"; } # the note first: rm too may be interrupted
pip_install() { "$python" -I -m pip install -qq --disable-pip-version-check --no-deps "$@"; }

case ${VENV##*/} in
.venv*) ;;
*) echo "VENV=$VENV: this folder may be removed, so its name must begin with .venv" >&2 && exit 2 ;;
esac
if [ -L "$VENV" ]; then # another checkout may live on what it points to
    echo "$VENV: is a link, and what it points to would be changed; remove the link, or name another VENV" >&2 && exit 2
fi
if [ -n "$PY" ]; then
    PY=$(sh requirements/find-python.sh)
    [ "$(identity "$PY")" = "$(identity "$python")" ] || remove
fi

finished() {
    case $what in
    core) holds core || holds core all ;;
    all) holds core all ;;
    *) holds "$what" ;;
    esac
}
if ! finished; then
    if [ "$what" = beam ] || ! holds core; then
        PY=${PY:-$(sh requirements/find-python.sh)}
        remove
        "$PY" -I -m venv "$VENV"
    fi
    rm -f "$VENV/locks"
    echo "$VENV: $("$python" --version), installing requirements/$what.lock"
    # --no-deps: the lock is complete. --only-binary: nothing is built here, so no code of a package runs.
    pip_install --only-binary :all: --require-hashes --requirement "requirements/$what.lock"
    if [ "$what" = all ]; then locks core all; else locks "$what"; fi | note "$VENV/locks"
fi

# The checkout, linked in: again when its metadata changes. The build backend comes from the lock.
if [ "$(cat "$VENV/checkout" 2>/dev/null)" != "$(cksum pyproject.toml)" ]; then
    pip_install --no-build-isolation --editable .
    cksum pyproject.toml | note "$VENV/checkout"
fi
