#!/bin/sh
# What `make demo` runs, from the root of the repository with `dsc` on the PATH. It may be run again: artifacts are replaced.
set -eu

step() {
  printf '\n$ %s\n' "$*"
  "$@"
}

step dsc compile deepseek-v3 -o demo/v3
step dsc inspect demo/v3 --params
step dsc compile deepseek-v3-tiny -o demo/tiny
step dsc run demo/tiny
step dsc diff demo/tiny demo/tiny --backends numpy,numpy-f64

cat <<'END'

Where to look next:
  demo/v3/ir/             the 671B model as text, one file per stage
  demo/v3/manifest.json   what was compiled, from what, by which passes
  demo/tiny/              the same for a model small enough to run
  .venv/bin/dsc --help    everything else
END
