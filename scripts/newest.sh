#!/usr/bin/env bash
# Does goldengate work with the newest torch, transformers and megatron-core of the index? Makes an environment of them
# beside the project's own (which keeps the versions of uv.lock), says which they are, and runs verify and the tests in it.
#
#   scripts/newest.sh                                  every row in the quick layouts, then all tests
#   scripts/newest.sh llama3 qwen3_moe --layouts tp1   verify's arguments; then the tests
#   TESTS="tests/test_seeds.py" scripts/newest.sh ...  only these tests; TESTS= for none
#   ENVIRONMENT=DIR, KEEP=1                            where it is made (a folder for caches otherwise); not made anew
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
environment="${ENVIRONMENT:-${XDG_CACHE_HOME:-$HOME/.cache}/goldengate/newest}"
tests="${TESTS-tests}"
cd "$root"
uv() { if command -v uv >/dev/null && command uv --version >/dev/null 2>&1; then command uv "$@"; else python -m uv "$@"; fi; }

if [ -z "${KEEP:-}" ] || [ ! -x "$environment/bin/python" ]; then
  uv venv --quiet --clear --python "$(cat .python-version)" "$environment"
  # The project's own ranges, upwards as far as the index goes, and what its tests need.
  uv pip install --quiet --python "$environment/bin/python" --upgrade --resolution highest --editable '.[bench]' --group dev
fi
export HF_HUB_OFFLINE=1 VIRTUAL_ENV="$environment" PATH="$environment/bin:$PATH"
uv pip list --quiet --python "$environment/bin/python" | grep -E '^(torch|transformers|megatron-core|safetensors|numpy) '

failed=0
goldengate verify "$@" || failed=1
if [ -n "$tests" ]; then
  # shellcheck disable=SC2086
  python -m pytest $tests || failed=1
fi
exit $failed
