"""The results in ``bench/results``: collected from runs of ``pytest bench/``, by device and date."""

import datetime
import itertools
import json
import platform
import re
from pathlib import Path

from t2t_kernels.backends import BACKENDS
from t2tvit.files import write_atomically

RESULTS = Path(__file__).parent / "results"
PREDICTED = "predicted"  # a folder of RESULTS without measurements (see bench.predicted)
# The names of a result's ceilings.
COPY = "copy, GB/s"
PRODUCTS = {"fp32": "float32 products, TFLOP/s", "bf16": "bfloat16 products, TFLOP/s"}
# Backends of plain PyTorch, and ours.
PLAIN = ("reference", "eager")
OURS = (*(name for name in BACKENDS if name not in PLAIN), "fused", "fused-compile")


def collect(runs: list[Path]) -> dict:
    """Merge the parts of a run into a result: device, date, versions, ceilings and rows.

    Raises:
        ValueError: A file was not written by pytest bench/, or the parts are from different devices.
    """
    if not runs:
        raise ValueError("no RUN.json was given")
    parts = []
    for path in runs:
        try:
            part = json.loads(path.read_text())
            part["t2t"], part["benchmarks"][0]["extra_info"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path}: {type(error).__name__}: {error}; expected what pytest bench/ "
                "--benchmark-json writes"
            ) from None
        parts.append(part)
    devices = {describe(part) for part in parts}
    if len(devices) != 1:
        raise ValueError(f"got runs of {' and of '.join(sorted(devices))}, expected one device")
    first = parts[0]
    failed = [row for part in parts for row in part["t2t"]["failed"]]
    names = {row["name"] for row in failed}
    rows = [
        {"name": row["param"], **row["extra_info"]}
        for part in parts
        for row in part["benchmarks"]
        # Without these, the run was interrupted during the row.
        if row["param"] not in names and "tflops" in row["extra_info"]
    ]
    return {
        "device": devices.pop(),
        "date": datetime.datetime.fromisoformat(first["datetime"]).date().isoformat(),
        "versions": first["t2t"]["versions"],
        "ceilings": share_ceilings(rows, [part["t2t"]["ceilings"] for part in parts]),
        "rows": rows,
        "failed": failed,
    }


def share_ceilings(rows: list[dict], measured: list[dict[str, float]]) -> dict[str, float]:
    """Use the highest value of each ceiling for all rows, and return these values.

    A ceiling is measured again with every row. On a shared machine, a row can be faster than the ceiling
    that was measured with it.
    """
    ceilings = {name: max(each[name] for each in measured) for name in measured[0]}
    for row in rows:
        product = PRODUCTS[row["dtype"]]
        ceilings[product] = max(ceilings[product], row["ceiling_tflops"])
        if "ceiling_gb_per_second" in row:
            ceilings[COPY] = max(ceilings[COPY], row["ceiling_gb_per_second"])
    for row in rows:
        row["ceiling_tflops"] = ceilings[PRODUCTS[row["dtype"]]]
        if "ceiling_gb_per_second" in row:
            row["ceiling_gb_per_second"] = ceilings[COPY]
        if "mfu" in row:
            row["mfu"] = row["tflops"] / row["ceiling_tflops"]
    return ceilings


def describe(run: dict) -> str:
    """The device of a run: the GPU's name, or the processor and the number of threads."""
    device = run["benchmarks"][0]["extra_info"]["device"]
    if device != "cpu":
        return device
    brand = run["machine_info"]["cpu"].get("brand_raw", platform.machine())
    threads = run["t2t"]["threads"]
    return f"{brand}, {threads} thread{'s' if threads > 1 else ''}"


def keep(result: dict) -> Path:
    """Store a result under ``bench/results``."""
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['date']}.json"
    names = {row["name"] for row in result["rows"]}
    # A second run on the same day replaces the first only if it has all of its rows.
    for again in itertools.count(2):
        if not path.exists():
            break
        kept = {row["name"] for row in json.loads(path.read_text())["rows"]}
        if kept <= names:
            break
        path = folder / f"{result['date']}-{again}.json"
    write_atomically(path, json.dumps(result, indent=1) + "\n")
    return path


def group(row: dict) -> str:
    """A row's name without its backend; rows of the same group are compared."""
    return row["name"].removesuffix(f"-{row['backend']}")


def age(path: Path) -> tuple[str, int]:
    """The date of a kept result, and its number among several on one day; the largest is the newest."""
    year, month, day, *again = path.stem.split("-")
    return f"{year}-{month}-{day}", int(again[0]) if again else 1


def kept(folder: Path) -> list[Path]:
    """The results of a device, the newest first."""
    return sorted(folder.glob("*.json"), key=age, reverse=True)


def devices() -> list[Path]:
    """The folders of the devices that have measured results."""
    return sorted(
        folder
        for folder in RESULTS.glob("*")
        if folder.name != PREDICTED and any(folder.glob("*.json"))
    )


def newest() -> list[Path]:
    """The newest kept result of each device."""
    return [kept(folder)[0] for folder in devices()]
