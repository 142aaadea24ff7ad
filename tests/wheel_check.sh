#!/usr/bin/env bash
# Install the built wheel into a clean environment, without development packages, and use it as a newcomer would.
# Run by `make wheel-check`, after the wheel is in dist/.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
wheel=$(ls -t "$root"/dist/diablo_export-*.whl | head -n 1)

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
venv/bin/python - <<'PY'
import json, pathlib, sys
import diablo_export, diablo_export.converters.hf_merge
assert "converters" not in sys.modules, "converters must not be importable by its bare name"
manifest = json.loads(pathlib.Path("merged/diablo_export.json").read_text())
assert len(manifest["modules"]) == 14 and all(m["action"] == "merged" for m in manifest["modules"]), manifest["modules"]
print("wheel: merged", len(manifest["modules"]), "modules in a clean environment")
PY
