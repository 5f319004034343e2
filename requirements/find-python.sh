#!/bin/sh
# Prints the newest CPython that works and that the locks serve. PY=python3.12 asks for that version, any other PY
# names the interpreter itself. Candidates are run, not just looked up: a pyenv shim may exist and fail while the
# interpreter lies beside it, and some systems ship a python3 without venv.
NEWEST=3.14 OLDEST=3.11
case ${PY:-} in
python3.1[1-4]) NEWEST=${PY#python} OLDEST=${PY#python} PY= ;;
esac

probe='
import sys, sysconfig
try:
    import ensurepip, ssl, venv
except ImportError as error:
    sys.exit(error)
version, oldest, newest = ["%d.%d" % sys.version_info[:2], *sys.argv[1:]]
number = lambda text: [int(part) for part in text.split(".")]
plain = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
if not plain or not number(oldest) <= number(version) <= number(newest):
    sys.exit("it is %s %s" % (sys.implementation.name, sys.version.split("\n")[0]))
print(getattr(sys, "_base_executable", sys.executable))
'
probe() { "$1" -I -c "$probe" "$OLDEST" "$NEWEST" </dev/null; }
works() { [ -x "$1" ] && probe "$1" 2>/dev/null; }

if [ -n "${PY:-}" ]; then
    probe "$PY" 2>/dev/null && exit
    echo "PY=$PY: $(probe "$PY" 2>&1 | head -n 1)" >&2
    echo "name a CPython $OLDEST to $NEWEST that has venv, or leave PY out to have one found" >&2
    exit 2
fi

IFS=:
minor=${NEWEST#3.}
while [ "$minor" -ge "${OLDEST#3.}" ]; do
    name=python3.$minor
    for folder in $PATH; do works "$folder/$name" && exit; done
    for python in "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/"$name" \
        "$HOME/.local/share/uv/python/cpython-3.$minor".*/bin/"$name"; do
        works "$python" && exit
    done
    minor=$((minor - 1))
done
for folder in $PATH; do works "$folder/python3" && exit; done
[ "$OLDEST" = "$NEWEST" ] && range=$NEWEST || range="$OLDEST to $NEWEST"
echo "no working CPython $range with venv on PATH, in pyenv or in uv; install one (Debian: apt-get install" \
    "python3-venv) or name it: PY=/path/to/python" >&2
exit 2
