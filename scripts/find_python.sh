#!/bin/sh
# Prints the path of a Python that can make the project's environment, or says what is missing.
#   find_python.sh oldest    the oldest that is supported, for .venv
#   find_python.sh newest    the newest from 3.12 on, for .venv-newest
# Each candidate is run, not just looked up: a version manager's stand-in may answer for nothing.
set -eu

want=${1:-oldest}
case $want in
    oldest) minor=11 names="python3.11 python3.12 python3.13 python3 python python3.14" ;;
    newest) minor=12 names="python3.13 python3.12 python3.14 python3" ;;
    *) echo "usage: find_python.sh oldest|newest" >&2; exit 2 ;;
esac

probe="
import sys
if sys.version_info < (3, $minor):
    sys.exit('%s is Python %d.%d' % ((sys.executable,) + tuple(sys.version_info[:2])))
try:
    import ensurepip, ssl, venv
except ImportError as error:
    sys.exit('%s lacks a standard module (%s); on Debian and Ubuntu: apt install python3-venv'
             % (sys.executable, error))
print(sys.executable)
"
found=""
for name in $names; do
    for candidate in "$name" "$HOME/.pyenv/versions/${name#python}".*/bin/"$name"; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if answer=$("$candidate" -c "$probe" 2>&1 </dev/null); then
            echo "$answer"
            exit 0
        fi
        found="$found
  $(echo "$answer" | tail -n 1)"
    done
done

if [ -z "$found" ]; then
    echo "No Python found. vmonarch_jax needs Python 3.$minor or newer on PATH." >&2
else
    echo "No usable Python found. vmonarch_jax needs Python 3.$minor or newer, with venv; found:$found" >&2
fi
echo "Install one, or name one: make PYTHON=/path/to/python3" >&2
exit 1
