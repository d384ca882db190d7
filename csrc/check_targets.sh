#!/usr/bin/env bash
# Compiles the native runtime, warnings as errors, for the processors this machine is not, and runs the tests of the
# kernels in an emulator. What has no compiler or no emulator here is skipped, and said to be; `python` needs pytest.
#   Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

skip() { printf '!! SKIPPED %s: %s\n' "$1" "$2"; }

check() {
  local processor=$1 build=$work/$1
  local compiler=$processor-linux-gnu-g++ emulator=qemu-$processor-static
  command -v cmake >/dev/null || { skip "$processor" "no cmake"; return; }
  command -v "$compiler" >/dev/null || { skip "$processor" "no $compiler"; return; }
  cmake -S csrc -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR="$processor" -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_CXX_FLAGS="-Wall -Wextra -Werror" -DCMAKE_EXE_LINKER_FLAGS=-static >"$build.log" \
    || { cat "$build.log"; return 1; }
  cmake --build "$build" --parallel 2 >"$build.log" || { cat "$build.log"; return 1; }
  echo "$processor: compiled with $compiler"
  command -v "$emulator" >/dev/null || { skip "$processor" "compiled, but not run: no $emulator"; return; }
  METAFAST_TEST_MACHINE="$emulator $build/run_kernels" python -m pytest -q tests/test_kernels.py
}

for processor in aarch64 x86_64; do
  [ "$processor" = "$(uname -m)" ] || check "$processor"
done
