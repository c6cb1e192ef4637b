#!/bin/sh
# SPDX-License-Identifier: MIT
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer in a temporary folder and runs its tests
# under them once: a read past a tensor's end, which often goes unnoticed, ends the run with an error.
#
#     tests/sanitize.sh [more arguments for pytest]       # PYTHON names the interpreter; about four minutes on two cores
#
# Left out are the tests that start compilers or other processes: they would run sanitised, too, and test nothing more.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cp -r "$root/csrc" "$root/setup.py" "$root/pyproject.toml" "$folder"
mkdir "$folder/minimal" "$folder/tests"
cp "$root"/minimal/*.py "$folder/minimal"
for name in conftest test_fused test_softmax_op test_fused_linear test_fused_mlp test_decoder; do
    cp "$root/tests/$name.py" "$folder/tests"
done
: > "$folder/README.md"

cd "$folder"
MINIMAL_SANITIZE=address,undefined MINIMAL_BUILD_EXTENSION=1 "$python" setup.py -q build_ext --inplace > build.log 2>&1 ||
    { cat build.log; exit 1; }

# The sanitizer must be there before python's own allocations, and libstdc++ before the sanitizer looks for __cxa_throw.
# python's small-object allocator would hide overruns; torch leaks by design, so leaks are not looked for.
compiler=${CXX:-c++}
LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so)"
export LD_PRELOAD PYTHONMALLOC=malloc
# Reports go to files: pytest holds standard error, and what it holds dies with the process.
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:allocator_may_return_null=1:log_path=$folder/report
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:log_path=$folder/report
export MINIMAL_REQUIRE_FUSED=1 MINIMAL_FUSED=1
unset PYTHONPATH

"$python" -c 'import minimal.fused, sys; C = sys.modules["minimal._C"]; assert "-fsanitize" in C.flags, C.flags; print(C.flags)'
"$python" -m pytest -q -n 0 -p no:cacheprovider -k "not compile and not export and not process and not gradcheck" tests "$@" ||
    { cat "$folder"/report.* 2> /dev/null || true; echo "sanitize: failed"; exit 1; }
echo "sanitize: no errors found"
