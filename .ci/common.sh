# What .ci/run and .ci/release share; $work is a folder for what they make.
# shellcheck shell=bash

say() { printf '\n=== %s (%d s)\n' "$*" "$SECONDS"; }

# The interpreter of a Python version: on PATH, or one of pyenv's; prints nothing where there is none.
find_python() {
  local candidate
  for candidate in "python$1" "$(command -v pyenv >/dev/null && ls -d "$(pyenv root)/versions/$1".*/bin/python 2>/dev/null | tail -n 1)"; do
    if [ -n "$candidate" ] && "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

# The wheel and the sdist in $work/dist, checked; the environment on PATH holds build, twine and check-wheel-contents.
built_packages() {
  python -m build -o "$work/dist" . >"$work/build.log" || { cat "$work/build.log"; return 1; }
  python -m twine check --strict "$work"/dist/*
  check-wheel-contents --ignore W002 "$work"/dist/*.whl # the data's licence stands beside the data and among the licences
}
