#!/usr/bin/env bash
# Install the built wheel into a clean environment, without development packages, and use it as a newcomer would:
# without onnxruntime, with it, and as the pure wheel that a machine without a compiler gets.
# Run by `make wheel-check`, after the wheel is in dist/.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
wheel=$(ls -t "$root"/dist/diablo_export-*.whl | head -n 1)
unset DIABLO_KERNELS

# A tiny model and adapter, made with the development environment; only the wheel's environment uses them.
(cd "$root" && .venv/bin/python -c "
import sys
from pathlib import Path
from tests import tiny
folder = Path(sys.argv[1])
tiny.make_adapter(tiny.make_model('llama', folder / 'model'), folder / 'adapter')
" "$work")

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "$wheel"
cd "$work"
venv/bin/diablo-export --help
venv/bin/diablo-export merge --model model --adapter adapter --output merged
venv/bin/diablo-export inspect merged --json > inspected.json
venv/bin/diablo-export doctor > doctor.txt
grep -q 'pip install "diablo-export\[cpu\]"' doctor.txt || { cat doctor.txt; exit 1; }
venv/bin/python - <<'PY'
import json, pathlib, sys
import diablo_export, diablo_export.converters.hf_merge
assert "converters" not in sys.modules, "converters must not be importable by its bare name"
manifest = json.loads(pathlib.Path("merged/diablo_export.json").read_text())
assert len(manifest["modules"]) == 14 and all(m["action"] == "merged" for m in manifest["modules"]), manifest["modules"]
print("wheel: merged", len(manifest["modules"]), "modules in a clean environment")
PY

venv/bin/pip install --quiet "$wheel[cpu]"
case "$wheel" in
*-py3-none-any.whl)
    command -v c++ && { echo "there is a C++ compiler, but $wheel holds no kernels"; exit 1; }
    ;;
*-py3-none-*)
    venv/bin/python "$root/tests/wheel_session.py" with-kernels
    # nothing but the C library, so that it runs wherever Python does, and nothing shown but the two functions
    library=$(echo venv/lib/python3*/site-packages/diablo_export/kernels/*.so)
    if command -v readelf && command -v nm; then
        readelf -d "$library" | grep NEEDED | grep -v 'libc\.so\|ld-linux' && { echo "$library needs more"; exit 1; }
        shown=$(nm --dynamic --defined-only "$library" | awk '{print $NF}' | sort | tr '\n' ' ')
        [ "$shown" = "DiabloDescribe RegisterCustomOps " ] || { echo "$library shows $shown"; exit 1; }
    fi
    ;;
*) echo "$wheel: tagged for one version of Python"; exit 1 ;;
esac
venv/bin/diablo-export doctor > doctor.txt || { cat doctor.txt; exit 1; }

DIABLO_KERNELS_BUILD=off venv/bin/pip wheel --quiet --no-deps --wheel-dir pure "$root"/dist/diablo_export-*.tar.gz
venv/bin/pip install --quiet --force-reinstall --no-deps pure/diablo_export-*-py3-none-any.whl
venv/bin/python "$root/tests/wheel_session.py" without-kernels
