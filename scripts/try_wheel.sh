#!/usr/bin/env bash
# Does the wheel hold all that it needs? Builds it, installs it alone into a new environment in another folder, and there
# verifies a row and converts a checkpoint. The project's sources are not on the path.
#
#   scripts/try_wheel.sh            with the versions of uv.lock
#   PYTHON_ENVIRONMENT=DIR ...      with the libraries of another environment (quicker: nothing is downloaded)
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
cd "$root"
uv() { if command -v uv >/dev/null && command uv --version >/dev/null 2>&1; then command uv "$@"; else python -m uv "$@"; fi; }
python="$(cat .python-version)"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

uv build --quiet --wheel --out-dir "$folder/wheel" .
wheel="$(echo "$folder"/wheel/*.whl)"
python -m zipfile -l "$wheel" >"$folder/contents"
for needed in bridges/py.typed harness/py.typed toy_models/py.typed harness/report/report.html toy_models/rows/llama3.json goldens/llama3.safetensors; do
  grep -q "^$needed " "$folder/contents" || { echo "the wheel lacks $needed"; exit 1; }
done
uv venv --quiet --python "$python" "$folder/environment"
new="$folder/environment/bin/python"
if [ -n "${PYTHON_ENVIRONMENT:-}" ]; then
  uv pip install --quiet --python "$new" --no-deps "$wheel"
  "$PYTHON_ENVIRONMENT/bin/python" -c 'import site; print(site.getsitepackages()[0])' >"$folder/libraries"
  # A folder of links, without what is editable there: that would be the project's sources again.
  site="$("$new" -c 'import site; print(site.getsitepackages()[0])')"
  for entry in "$(cat "$folder/libraries")"/*; do
    case "$(basename "$entry")" in goldengate* | _goldengate* | __editable__* | *.pth | bridges | harness | toy_models | goldens) continue ;; esac
    [ -e "$site/$(basename "$entry")" ] || ln -s "$entry" "$site/"
  done
else
  uv export --quiet --no-dev --no-emit-project --format requirements-txt >"$folder/pins.txt"
  uv pip install --quiet --python "$new" -r "$folder/pins.txt"
  uv pip install --quiet --python "$new" --no-deps "$wheel"
fi

mkdir "$folder/elsewhere"
cd "$folder/elsewhere"
export HF_HUB_OFFLINE=1
unset PYTHONPATH
"$new" - "$root" <<'PYTHON'
import sys
import bridges, harness, toy_models
for module in (bridges, harness, toy_models):
    assert not module.__file__.startswith(sys.argv[1]), f"{module.__file__} is the source, not the wheel"
toy_models.write("llama3", "model", shards=2)
PYTHON
"$folder/environment/bin/goldengate" verify llama3 --layouts tp1 --html report.html
test -s report.html
"$folder/environment/bin/goldengate" convert roundtrip model --layout tp2
echo "the wheel works on its own: $(basename "$wheel")"
