"""``make gpu-report``: build, check and measure the kernels on a GPU, in under 10 minutes.

Every part runs in its own process, so that a part that fails, hangs or breaks the GPU's context does not
affect the others. The parts share a time budget in order of importance; each leaves the minimum time of
the later ones. Nothing is downloaded: this Python must have torch and the test tools. All output goes to
one folder: ``result.json``, its tables and plots, and ``log.txt``.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPERATIONS = sorted(path.parent.name for path in (ROOT / "t2t_kernels").glob("*/api.py"))
BUDGET, REPORT_SECONDS, FULL_SECONDS = 560, 45, 1800
# Expressions that select the tests of each dtype by name.
PARITY = {
    "float32": "float32",
    "float16": "float16 and not bfloat16",
    "bfloat16": "bfloat16",
    "others": "not float32 and not float16",
}
CUDA_LIBRARY = ROOT / "t2t_kernels" / "_cuda.so"
# Seconds for writing measurements after a part is told to stop.
GRACE = 15
LINES = 60
# Environment variables that would change the kernels of the rows.
UNSET = ("T2T_BACKEND", "TRITON_INTERPRET")


@dataclass(frozen=True)
class Part:
    """A command of this Python, its time limit, and the minimum time that earlier parts leave for it.

    ``run`` is the benchmark file that it writes, if any. Parts that are not ``timed`` run in parallel.
    ``under`` is a program that runs the command, such as a memory checker.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: int
    least: int = 0
    run: Path | None = None
    timed: bool = True
    under: tuple[str, ...] = ()


def parts(full: bool, folder: Path) -> list[Part]:
    """All parts before the report; with ``full`` all rows, without the short time limits."""

    def limit(seconds: int) -> int:
        return FULL_SECONDS if full else seconds

    def benchmark(
        name: str, file: str, chosen: str, seconds: int, least: int, *options: str
    ) -> Part:
        run = folder / f"run-{name.replace(' ', '-')}.json"
        arguments = ("-m", "pytest", f"bench/{file}", "-q", "-k", chosen, *options)
        arguments = (*arguments, f"--benchmark-json={run}")
        return Part(name, arguments, limit(seconds), least, run)

    found = [
        Part("build", ("setup.py", "build_ext", "--inplace"), limit(180), 150),
        Part("info", ("-m", "t2t_kernels.info"), limit(20), 5),
    ]
    # In parallel, also by dtype: most of the time is spent in Triton's compiler, which uses one core.
    for name, (dtype, chosen) in itertools.product(OPERATIONS, PARITY.items()):
        tests = (
            "-m",
            "pytest",
            f"tests/kernels/test_{name}.py",
            "-v",
            "-k",
            f"not cpu and {chosen}",
        )
        found.append(Part(f"parity {name} {dtype}", tests, limit(150), 90, timed=False))
    if (checker := memory_checker()) is not None:
        tests = ("-m", "pytest", "tests/kernels", "-q", "-k", "cuda and test_parity and bfloat16")
        under = (checker, "--tool", "memcheck", "--error-exitcode", "1")
        found.append(Part("compute-sanitizer", tests, limit(60), 30, under=under))
    # Models train in half precision and call layers, so these rows come first; FULL=1 measures all.
    rows = "" if full else " and bf16 and (full or forward and (layer or module))"
    for name in (*OPERATIONS, "_module"):
        what = f"bench {name.replace('_module', 'modules')}"
        found.append(benchmark(what, "test_kernels.py", f"{name}-{rows}", 50, 10))
    models = "224" if full else "bf16-training and (t2t_vit_14 or t2t_vit_t_14 or deit)"
    memory = ("--memory", "24") if full else ()
    found.append(benchmark("bench models", "test_models.py", models, 60, 30, *memory))
    rivals = "compile or convolution"
    if not full:
        rivals = f"({rivals}) and not autotune and bf16-full and (r_layer or performer_module)"
    found.append(benchmark("rivals", "test_kernels.py", rivals, 150, 40, "--compiled"))
    if full:
        found.append(benchmark("compiled models", "test_models.py", "compile", 60, 0, "--compiled"))
    return found


def memory_checker() -> str | None:
    """The path of compute-sanitizer, from PATH or the CUDA toolkit, if there is one."""
    from torch.utils.cpp_extension import CUDA_HOME

    toolkit = os.path.join(CUDA_HOME, "bin") if CUDA_HOME else None
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=toolkit)


def run(part: Part, end: float) -> tuple[str, str]:
    """Run a part until it ends, or until its time limit or that of all parts.

    Args:
        end: The end of all parts, in seconds of ``time.monotonic``.

    Returns:
        A line with the outcome, and the output.
    """
    started = time.monotonic()
    seconds = min(part.seconds, end - started)
    if seconds <= 0:
        return "not started: no time was left", ""
    environment = {key: value for key, value in os.environ.items() if key not in UNSET}
    environment["PYTHONUNBUFFERED"] = "1"
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*part.under, sys.executable, *part.arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
            ended = "done" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            ended = "stopped: time limit reached"
            # pytest then writes its measurements.
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            # Its compilers and workers belong to its session.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        taken = time.monotonic() - started
        output.seek(0)
        said = output.read().decode(errors="replace")
    how = f"{ended} in {taken:.0f} s{verdicts(said)}"
    print(f"{part.name}: {how}", flush=True)
    return how, f"== {part.name}: python {' '.join(part.arguments)}\n{said}\n"


def verdicts(output: str) -> str:
    """The counts of pytest's outcomes, even if it was stopped before its last line."""
    last = re.findall(
        r"^=*\s*(\d+ (?:passed|failed|skipped).*?) in [\d.]+s.*$", output, re.MULTILINE
    )
    if last:
        return f": {last[-1]}"
    counts = {
        word: len(re.findall(rf" {word}\b", output)) for word in ("PASSED", "FAILED", "ERROR")
    }
    said = ", ".join(f"{count} {word.lower()}" for word, count in counts.items() if count)
    return f": {said} until then" if said else ""


def table(lines: list[tuple[str, str]], result: dict | None) -> str:
    """At most 60 lines: the outcome of each part, failed rows, and measured rows."""
    width = max(len(name) for name, _ in lines)
    text = [f"{name:<{width}}  {how}" for name, how in lines]
    if result is not None:
        text += [f"FAILED {row['name']}: {row['reason']}"[:160] for row in result["failed"][:12]]
        rows = [row for row in result["rows"] if row["pass"] in ("full", "training")]
        rows.sort(key=lambda row: row["backend"] == "reference")
        width = max((len(row["name"]) for row in rows), default=0)
        for row in rows:
            rate = f"{row['tflops']:7.2f} TFLOP/s {row['tflops'] / row['ceiling_tflops']:5.1%}"
            if "images_per_second" in row:
                rate += f" {row['images_per_second']:8.0f} images/s"
            else:
                share = row["gb_per_second"] / row["ceiling_gb_per_second"]
                rate += f" {row['gb_per_second']:6.0f} GB/s {share:4.0%}"
            text.append(
                f"{row['name']:<{width}}  {row['speedup_vs_reference']:6.2f}x "
                f"{1e3 * row['median_seconds']:9.3f} ms {rate}"
            )
    if len(text) > LINES:
        text = [*text[: LINES - 1], f"... and {len(text) - LINES + 1} more: see result.md"]
    return "\n".join(text)


def why_not() -> str | None:
    """The reason why nothing can be measured here; None if it can."""
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} has no torch ({error}); name another: make gpu-report PYTHON=..."
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device; this command measures a GPU"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the folder of the report"
    )
    parser.add_argument("--full", action="store_true", help="measure every row, which takes hours")
    arguments = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(f"gpu-report: {reason}", file=sys.stderr)
        return 2
    return measure(arguments.output.resolve(), arguments.full)


def in_turn(chosen: list[Part]) -> list[tuple[list[Part], int]]:
    """Groups of parts that run together, in order, each with the minimum time of later groups."""
    groups = []
    for timed, group in itertools.groupby(chosen, key=lambda part: part.timed):
        together = list(group)
        groups += [[part] for part in together] if timed else [together]
    least = [max(part.least for part in group) for group in groups]
    return [(group, sum(least[i + 1 :])) for i, group in enumerate(groups)]


def measure(folder: Path, full: bool) -> int:
    """Run all parts and then the report; returns 0 if all succeeded, else 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("run-*.json"), *folder.glob("result*")):
        stale.unlink()
    end = time.monotonic() + (float("inf") if full else BUDGET - REPORT_SECONDS)
    chosen = parts(full, folder)
    lines = []
    with open(folder / "log.txt", "w") as log:

        def note(group: list[Part], end: float) -> None:
            with ThreadPoolExecutor(len(group)) as pool:
                for part, (how, said) in zip(group, pool.map(lambda part: run(part, end), group)):
                    lines.append((part.name, how))
                    log.write(said)
                    log.flush()

        for group, reserved in in_turn(chosen):
            note(group, end - reserved)
            if group[0].name == "build" and not CUDA_LIBRARY.exists():
                lines.append(("CUDA library", "not built, see log.txt; measured without it"))
        runs = [str(part.run) for part in chosen if part.run is not None and part.run.exists()]
        arguments = ("-m", "bench.report", "--output", str(folder), *runs)
        note([Part("report", arguments, REPORT_SECONDS)], float("inf"))
    result = folder / "result.json"
    for path in runs if result.exists() else ():
        Path(path).unlink()
    print(table(lines, json.loads(result.read_text()) if result.exists() else None))
    print(f"in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0 if all(how.startswith("done") for _, how in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
