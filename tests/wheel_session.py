"""What a session of an installed wheel runs with: python tests/wheel_session.py with-kernels|without-kernels.

Run outside of the checkout by tests/wheel_check.sh, and on every wheel that is built for others.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import numpy as np

import diablo_export
from diablo_export import kernel_check, opschema, runtime
from diablo_export.blockdiag import apply

wanted = sys.argv[1]
assert wanted in ("with-kernels", "without-kernels"), wanted
said: list[str] = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
logging.getLogger("diablo_export").addHandler(handler)
logging.getLogger("diablo_export").setLevel(logging.INFO)

package = Path(diablo_export.__file__).resolve().parent
assert package.parent == Path(np.__file__).resolve().parent.parent, f"{package} is not the installed one"
library = runtime.find_library()
found = {key: value for part in kernel_check.checks() for key, value in part.items()}

random = np.random.default_rng(0)
x, d, y0 = (random.normal(size=size).astype(np.float32) for size in ((3, 64), (4, 16, 12), (3, 48)))
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "model.onnx")
    path.write_bytes(kernel_check.one_node(opschema.function()))
    (y,) = runtime.session(path).run(None, {"X": x, "D": d, "Y0": y0})
assert np.abs(y - apply(x, d, 48, y0)).max() < 1e-4  # sums of 16 float32 products near 1
assert len(said) == 1, said
if wanted == "with-kernels":
    assert library is not None and library.parent == package / "kernels", library
    assert found["kernel_error"] and max(found["kernel_error"].values()) < 1e-4, found
    assert str(library) in said[0] and found["about"]["isa"] in said[0], said
else:
    assert library is None and found["reason"].startswith("not in this wheel: "), found
    assert f"kernels: none ({found['reason']})" in said[0], said
print(f"wheel: a session says: {said[0]}")
