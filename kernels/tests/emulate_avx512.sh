#!/usr/bin/env bash
# Runs the tests through avx512.cc on a processor without AVX-512, each of its instructions emulated by SIMDe (Debian:
# libsimde-dev). Says nothing about speed.
#
# usage: kernels/tests/emulate_avx512.sh [calls] [folder that holds simde/]
set -euo pipefail
cd "$(dirname "$0")/.."
calls=${1:-10000} simde=${2:-/usr/include}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

sed -E 's/_mm512_/simde_mm512_/g; s/__m512/simde__m512/g; s/__mmask16/simde__mmask16/g
        s/<immintrin.h>/"emulate_avx512.h"/' cpu/avx512.cc > "$work/avx512.cc"
sed 's/__builtin_cpu_supports("avx512f")/1/' cpu/block_diag.cc > "$work/block_diag.cc"
compile=(g++ -std=c++17 -O1 -w -DDIABLO_X86 -Iinclude -Icpu -Itests -I"$simde")
for source in "$work/avx512.cc" cpu/avx2.cc; do
    "${compile[@]}" -mavx2 -mfma -mf16c -c "$source" -o "$work/$(basename "$source").o"
done
for test in numbers contract; do
    "${compile[@]}" tests/${test}_test.cc "$work"/block_diag.cc cpu/{check,portable,reference}.cc "$work"/*.o \
        -pthread -o "$work/$test"
done
"$work/numbers" "$calls" && "$work/contract"
