"""The certificate of an export: golden rows, limits, every file's hash, versions; written by parity, read by verify.

`certificate.json` carries a seal, the SHA-256 of its own text with the seal left out, and the hash of every other file
of the folder. So a byte that changed anywhere is found. It is no signature: whoever means to deceive can seal anew.
Numpy alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diablo_export.errors import InputError, OutputError
from diablo_export.measure import golden
from diablo_export.measure.golden import Golden
from diablo_export.output import CERTIFICATE as CERTIFICATE
from diablo_export.output import GOLDEN as GOLDEN

FORMAT_VERSION = 1
_NO_SEAL = "0" * 64
_SEAL = re.compile(r'"seal": "([0-9a-f]{64})"')
# KL(certified ‖ device) that another provider's rounding may cost. float32: matrices multiplied in TF32 are off by
# 2^-11, some 1e-2 of logits of order 10, and KL is about half the square. float16: as parity's own limit
_DRIFT = {"fp32": 1e-4, "fp16": 1e-3, "bf16": 1e-2}
# quantized: activations round to int8, and sums in another order move a code now and then; at least this much
_DRIFT_QUANTIZED = 1e-3


def write(
    folder: Path,
    cases: Sequence[Golden],
    precision: str,
    environment: dict[str, Any],
    graph: dict[str, Any] | None = None,
) -> None:
    """Certify a folder as it is now; both files appear whole or not at all.

    Args:
        folder: the output folder, checked and found good.
        cases: what its model gave.
        precision: fp32, fp16, bf16, int8 or int4: of its weights.
        environment: what it was checked with.
        graph: of another program's export, what `verify` must know to run it: `{"file", "output", "length",
            "cache_shape", "adapter"}`, file names relative to the folder.
    """
    revoke(folder)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **golden.pack(cases))  # type: ignore[arg-type]
    _write(folder / GOLDEN, buffer.getvalue())
    body = {
        "format_version": FORMAT_VERSION,
        "seal": _NO_SEAL,
        "precision": precision,
        "cases": [{"adapter": case.adapter, "limits": limits(case, precision)} for case in cases],
        "files": {name: _sha256(folder / name) for name in files(folder)},
        "environment": environment,
        **({"graph": graph} if graph else {}),
    }
    text = json.dumps(body, indent=1, allow_nan=False) + "\n"
    _write(folder / CERTIFICATE, text.replace(_NO_SEAL, hashlib.sha256(text.encode()).hexdigest(), 1).encode())


def limits(case: Golden, precision: str) -> dict[str, float]:
    """What a device is held to.

    `drift`: mean KL(certified ‖ device). A quantized model may stray from what was certified as far as that strays from
    tuned. `distance`: mean KL(tuned ‖ device), at most twice what was certified, and the drift.
    """
    drift = _DRIFT.get(precision, max(_DRIFT_QUANTIZED, case.distance))
    return {"drift": drift, "distance": 2 * case.distance + drift}


def revoke(folder: Path) -> None:
    """Take a certificate away: a folder that is being checked again, or failed, has none."""
    for name in (CERTIFICATE, GOLDEN):
        (folder / name).unlink(missing_ok=True)


def read(folder: Path) -> tuple[dict[str, Any], list[Golden], list[str]]:
    """The certificate, its golden rows, and the names of files that are not what was certified.

    Where a file changed there are no golden rows: nothing of such a folder should be run.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    file = folder / CERTIFICATE
    if folder.is_file():
        raise InputError(f"{folder}: is a file; give the folder that was certified")
    if not folder.exists():
        raise InputError(f"{folder}: no such folder; give the folder that was certified")
    if not file.is_file():
        raise InputError(f"{folder}: has no {CERTIFICATE}; make one with: diablo-export parity {folder} --certificate")
    try:
        text = file.read_bytes().decode()
        body: dict[str, Any] = json.loads(text)
        seal = _SEAL.search(text)
        announced: dict[str, str] = body["files"]
        adapters = [case["adapter"] for case in body["cases"]]
        version = body["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: cannot be read ({error!r}); certify the folder again") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{file}: has format_version {version}; this program reads {FORMAT_VERSION}")
    blank = _SEAL.sub(f'"seal": "{_NO_SEAL}"', text, count=1)
    changed = [] if seal and seal[1] == hashlib.sha256(blank.encode()).hexdigest() else [CERTIFICATE]
    for name, digest in announced.items():
        here = folder / name
        if not here.is_file() or _sha256(here) != digest:
            changed.append(name)
    return body, [] if changed else _golden(folder / GOLDEN, adapters), sorted(changed)


def files(folder: Path) -> list[str]:
    """Every file of a folder that a certificate speaks of: all but itself."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != CERTIFICATE)


def _golden(file: Path, adapters: Sequence[str | None]) -> list[Golden]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return golden.unpack({name: arrays[name] for name in arrays.files}, adapters)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{file}: cannot be read ({error}); copy the folder again, or certify it again") from error


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(file: Path, content: bytes) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror}; make room, or choose another place") from error
    finally:
        partial.unlink(missing_ok=True)
