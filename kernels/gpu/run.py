"""Everything that needs a GPU, in one go and under ten minutes: builds, checks and times the CUDA code.

    python kernels/gpu/run.py [--output build/gpu]            # or: make gpu
    python kernels/gpu/run.py --prepare build/gpu-kit         # on a machine with nvcc and this project's packages
    python kernels/gpu/run.py --kit build/gpu-kit             # on a machine with a GPU and neither, nor a network
    python kernels/gpu/run.py --only sessions,training        # some parts again; the others' results are kept

Writes gpu.json and gpu.md, anew after each part. Each part is a process of its own with a time limit: what one of them
breaks, the others still show, and of one that is cut off what it had found by then. Exits with 0 when every check held
and every limit was met, 1 when one was not, 2 where there is no GPU or nothing to run on it. `--device cpu --small`
tries the scripts themselves where there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from limits import Figure, figures, table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOGETHER = 540  # seconds that everything may take, a build for one GPU included
KIT = ROOT / "build" / "gpu-kit"
EVERY = "80-real;87-real;89-real;90-real;100-real;120"
PARTS = ("numbers", "speed", "training", "sessions", "memcheck", "racecheck", "synccheck")
LIBRARIES = ("libdiablo_kernels_c.so", "libdiablo_kernels_ort.so")


def asked_for() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--kit", type=Path, help=f"what --prepare made; unless named, {KIT.relative_to(ROOT)} if there")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="make a kit, and run nothing")
    parser.add_argument("--architectures", default=EVERY, help="that --prepare compiles for (default %(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a few small calls, to try the scripts")
    parser.add_argument("--only", metavar="PART,PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=TOGETHER, help="that all parts may take (default %(default)s)")
    return parser.parse_args()


def main() -> None:
    asked, began = asked_for(), time.monotonic()
    if asked.prepare:
        return prepare(asked.prepare, asked.architectures)
    only = asked.only.split(",") if asked.only else list(PARTS)
    if unknown := sorted(set(only) - set(PARTS)):
        stop(f"--only {','.join(unknown)}: no such part; there are {', '.join(PARTS)}")
    machine = describe(asked.device)
    kit = asked.kit or (KIT if KIT.is_dir() else None)
    absent = [name for name in LIBRARIES if kit and not (kit / name).is_file()]
    if absent:
        stop(f"{kit}: has no {' and no '.join(absent)}; `run.py --prepare` makes a kit that does")
    library = kit if kit and loads(kit) else build(ROOT / "build" / "gpu-library", architecture(machine))
    models = kit / "models" if kit and (kit / "models").is_dir() else None
    asked.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine, "parts": earlier(asked.output, machine) if asked.only else {}}
    write(report, asked.output)
    for name, command, most in parts(library, models, asked.device, asked.small):
        if name not in only:
            continue
        left = began + asked.seconds - time.monotonic()
        limit = most if asked.device == "cuda" else left  # on a processor others may be at work
        watched = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name.endswith("check") else {}  # each tensor's own end
        found = (
            run(command, min(limit, left), **watched) if left > 1 else {"failed": "no time was left", "seconds": 0.0}
        )
        report["parts"][name] = found
        print(f"{name}: {found.get('failed') or 'done'} in {found['seconds']:.0f} s", flush=True)
        if "failed" in found:
            print(found.get("output", "")[-1500:], flush=True)
        write(report, asked.output)
    for one in figures(report):
        print(f"{'ok    ' if one.held else 'MISSED'} {one}")
    missed = f"{len(report['missed'])} of {len(report['figures'])} figures missed, above"
    print(f"{asked.output / 'gpu.md'}: {missed if report['missed'] else 'every check held and every limit was met'}")
    sys.exit(1 if report["missed"] else 0)


def loads(kit: Path) -> bool:
    """Whether its libraries load here; where they were made for another system, they are built on the spot."""
    try:
        for name in LIBRARIES:
            ctypes.CDLL(str((kit / name).resolve()))
    except OSError as error:
        print(f"{kit}: {error}; building instead", flush=True)
        return False
    return True


def earlier(output: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The parts of the run before, where it was on such a machine."""
    try:
        before = json.loads((output / "gpu.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(before["parts"]) if before.get("machine") == machine else {}


def write(report: dict[str, Any], output: Path) -> None:
    """gpu.json and gpu.md, as far as the report goes."""
    found = figures(report)
    report["figures"] = [{**asdict(one), "held": one.held} for one in found]
    report["missed"] = [str(one) for one in found if not one.held]
    (output / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "gpu.md").write_text(markdown(report, found), encoding="utf-8")


def stop(why: str) -> None:
    print(f"make gpu: {why}", file=sys.stderr)
    sys.exit(2)


def describe(device: str) -> dict[str, Any]:
    """The machine; ends the program where it has no GPU."""
    try:
        import torch
    except ImportError:
        stop("torch is not installed; it calls the kernels and is what they are compared with")
    found: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if device == "cuda":
        if not torch.cuda.is_available():
            why = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
            stop(
                f"no CUDA device: torch {torch.__version__} {why}, and nothing was run; --device cpu tries the scripts"
            )
        about = torch.cuda.get_device_properties(0)
        found |= {"device": about.name, "capability": f"{about.major}.{about.minor}", "memory": about.total_memory}
        found |= {"cuda": torch.version.cuda, "multiprocessors": about.multi_processor_count}
    return found


def architecture(machine: dict[str, Any]) -> str | None:
    """Of the GPU, in CMake's words; None without one."""
    return f"{machine['capability'].replace('.', '')}-real" if "capability" in machine else None


def tool(name: str) -> str | None:
    """A program of CUDA's, on the PATH or where CUDA installs it."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return shutil.which(name) or next(
        (found for home in homes if home and (found := shutil.which(f"{home}/bin/{name}"))), None
    )


def build(folder: Path, architectures: str | None) -> Path:
    """Both libraries, or with None their CPU half; ends the program where nothing can build them."""
    needed = {"cmake": shutil.which("cmake"), **({"nvcc": tool("nvcc")} if architectures else {})}
    absent = [name for name, place in needed.items() if place is None]
    if absent:
        stop(f"{' and '.join(absent)}: not on the PATH; give a kit that was made elsewhere: --kit FOLDER")
    settings = ["-DDIABLO_TESTS=ON", "-DCMAKE_BUILD_TYPE=Release", f"-DDIABLO_CUDA={'ON' if architectures else 'OFF'}"]
    if architectures:
        settings += [f"-DCMAKE_CUDA_ARCHITECTURES={architectures}", f"-DCMAKE_CUDA_COMPILER={needed['nvcc']}"]
    targets = ["--target", "diablo_kernels_c", "diablo_kernels_ort"]
    try:
        subprocess.run(["cmake", "-S", str(ROOT / "kernels"), "-B", str(folder), *settings], check=True)
        subprocess.run(["cmake", "--build", str(folder), "--parallel", *targets], check=True)
    except subprocess.CalledProcessError as error:
        stop(f"{' '.join(error.cmd)} failed, see above; a kit that was made elsewhere needs no compiler: --kit FOLDER")
    return folder


def prepare(kit: Path, architectures: str) -> None:
    """Libraries for these GPUs, and models."""
    kit.mkdir(parents=True, exist_ok=True)
    built = build(kit.parent / f"{kit.name}-library", architectures)
    for name in LIBRARIES:
        shutil.copy2(built / name, kit / name)
    with tempfile.TemporaryDirectory() as scratch:  # so that a kit can be made again
        make_models(kit / "models", Path(scratch))
    print(f"{kit}: {sum(file.stat().st_size for file in kit.rglob('*') if file.is_file()) / 1e6:.0f} MB")


def make_models(folder: Path, scratch: Path) -> None:
    """int4 exports with two adapters, also with fused layers: one with biases, one with zero points."""
    sys.path.insert(0, str(ROOT))
    import onnx

    from diablo_export.converters.export import export
    from diablo_export.converters.onnx_fuse import fuse_file
    from tests import tiny

    for architecture, asymmetric in (("qwen2", False), ("llama", True)):
        place = scratch / architecture
        model = tiny.make_model(architecture, place / "model")
        adapters = {"a": tiny.make_adapter(model, place / "a"), "b": tiny.make_other_adapter(model, place / "b")}
        made = folder / f"{architecture}-int4"
        export(model, adapters, made, quantize="int4", precision="fp16", asymmetric=asymmetric, overwrite=True)
        graph = onnx.load(made / "model.onnx", load_external_data=False)
        for node in graph.graph.node:  # on the CPU level 4 multiplies in int8, which CUDA does not
            kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend(kept)
        onnx.save(graph, made / "model.onnx")
        fuse_file(made / "model.onnx", made / "fused.onnx")


def parts(library: Path, models: Path | None, device: str, small: bool) -> list[tuple[str, list[str], int]]:
    """Name, command and seconds at most of each part; what needs nothing but torch comes first."""
    common = ["--library", str(library), "--device", device]
    tiny = ["--small"] if small else []
    correct = [sys.executable, str(HERE / "correctness.py"), *common]
    made = [("numbers", [*correct, "--calls", "40" if small else "2000"], 120)]
    made.append(("speed", [sys.executable, str(HERE / "speed.py"), *common, *tiny], 90))
    rounds = ["--rounds", "1"] if small else []
    made.append(("training", [sys.executable, str(HERE / "training.py"), "--device", device, *tiny, *rounds], 100))
    with_models = ["--models", str(models)] if models else []
    made.append(("sessions", [sys.executable, str(HERE / "sessions.py"), *common, *tiny, *with_models], 300))
    sanitizer = tool("compute-sanitizer") if device == "cuda" else None
    if sanitizer:  # looks at no kernels but these; what CUDA calls of others return is not its business
        watch = [sanitizer, "--error-exitcode", "99", "--kernel-name", "kns=diablo", "--report-api-errors", "no"]
        made += [(name, [*watch, "--tool", name, *correct, "--calls", "40", "--no-graphs"], 75) for name in PARTS[-3:]]
    return made


def run(command: list[str], limit: float, **variables: str) -> dict[str, Any]:
    """What a part printed at last, how it failed where it did, and how long it took."""
    began = time.perf_counter()
    failed = ""
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as complained:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
        part = subprocess.Popen(command, stdout=printed, stderr=complained, env=environment, process_group=0)
        try:
            if code := part.wait(limit):
                failed = f"exit code {code}"
        except subprocess.TimeoutExpired:
            failed = f"not done after {limit:.0f} s"
        finally:  # and what it started itself
            with contextlib.suppress(ProcessLookupError):
                os.killpg(part.pid, signal.SIGKILL)
            part.wait()
        texts = [_read(file) for file in (printed, complained)]
    result = last_found(texts[0])
    failed = failed or ("" if result else "it printed nothing")
    if failed:
        result = {**result, "failed": failed}
    if "failed" in result:
        result["output"] = "".join(texts)[-3000:]
    return {**result, "seconds": time.perf_counter() - began}


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def last_found(printed: str) -> dict[str, Any]:
    """Parts print all that they have found after each step: the last line that is whole counts."""
    for line in reversed(printed.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                return dict(json.loads(line))
    return {}


def markdown(report: dict[str, Any], found: list[Figure]) -> str:
    """The report as a section for docs/benchmarks.md."""
    machine, parts_ = report["machine"], report["parts"]
    lines = ["## CUDA", "", "```console", "$ make gpu", "```", ""]
    lines += [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    numbers = parts_.get("numbers", {})
    if "worst" in numbers:
        worst = ", ".join(f"{name} {error:.2f}" for name, error in numbers["worst"].items())
        lines += [f"Random calls: {numbers['calls']}; the worst error over what is allowed: {worst}.", ""]
    lines += speed_table(parts_.get("speed", {})) + session_tables(parts_.get("sessions", {}))
    lines += [*training_table(parts_.get("training", {})), *table(found)]
    return "\n".join(lines)


def speed_table(speed: dict[str, Any]) -> list[str]:
    if "bandwidth" not in speed:
        return []
    empty = speed["empty_call"] * 1e6
    lines = [f"A large copy moves {speed['bandwidth'] / 1e12:.3f} TB/s, a large product in bfloat16 does"]
    lines += [f"{speed['matrix_rate'] / 1e12:.1f} Tflop/s; a call with nothing to do takes {empty:.2f} us.", ""]
    lines += ["| kernel | layer | rows | us | floor us | ratio | without that call |", "|---|---|---|---|---|---|---|"]
    for kernel in ("branch", "int4", "dense"):
        for one in speed[kernel]:
            numbers = [f"{one[key]:.2f}" for key in ("us", "floor_us", "ratio", "ratio_without_launch") if key in one]
            row = (kernel, one["layer"], one["rows"], *numbers, *(["–"] if len(numbers) < 4 else []))
            lines.append("| " + " | ".join(map(str, row)) + " |")
    return [*lines, ""]


def session_tables(sessions: dict[str, Any]) -> list[str]:
    lines = []
    if sessions.get("models"):
        lines += [
            "| export | adapters | library | largest error / logit | not on the device |",
            "|---|---|---|---|---|",
        ]
        for name, one in sessions["models"].items():
            for ran in one["runs"]:
                elsewhere = ", ".join(ran["not_on_device"]) or "–"
                lines.append(f"| {name} | {one['adapters']} | {ran['library']} | {ran['error']:.2e} | {elsewhere} |")
        lines.append("")
    if sessions.get("layers"):
        lines += ["| layer | rows | MatMulNBits us | branch | LoRA | fused |", "|---|---|---|---|---|---|"]
        for one in sessions["layers"]:
            ratios = " | ".join(f"{one['ratio'][kind]:.3f}" for kind in ("branch", "lora", "fused"))
            lines.append(f"| {one['layer']} | {one['rows']} | {one['base_us']:.1f} | {ratios} |")
        lines.append("")
    return lines


def training_table(training: dict[str, Any]) -> list[str]:
    if "kinds" not in training:
        return []
    lines = [f"The products of {training['layers']} layers need {training['floor_ms']:.1f} ms a step at the rate of a"]
    lines += [f"large one, {training['matrix_rate'] / 1e12:.1f} Tflop/s.", ""]
    lines += ["| training | parameters | ms a step | tokens/s | peak MB |", "|---|---|---|---|---|"]
    for kind, one in training["kinds"].items():
        if "ms" not in one:
            continue
        cells = (
            one["parameters"],
            f"{one['ms']:.1f}",
            f"{one['tokens_per_second']:.0f}",
            f"{one['peak_bytes'] / 1e6:.0f}",
        )
        lines.append(f"| {kind} | " + " | ".join(map(str, cells)) + " |")
    absent = ", ".join(training["not_installed"])
    return [*lines, "", *([f"Not installed, so not compared with: {absent}.", ""] if absent else [])]


if __name__ == "__main__":
    main()
