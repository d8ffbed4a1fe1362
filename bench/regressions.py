"""``python -m bench.regressions A B``: rows that became slower or need more memory from A to B.

A row is slower if the ranges from the 20th to the 80th percentile overlap neither for its seconds nor
for its ratio to the reference. So neither a slower machine nor a faster reference is a regression. Rows
of plain PyTorch have no ratio: if they are slower, this is only noted.

Exit status: 0 no regression, 1 a regression, 2 the files cannot be compared.
"""

import argparse
import json
import sys
from pathlib import Path

from bench.kept_results import PLAIN

# Allowed relative difference of memory, because of rounding and the allocator.
MEMORY_SLACK = 0.02
NEEDED = ("name", "backend", "seconds_percentiles_20_80", "speedup_percentiles_20_80")


def load(path: Path) -> dict:
    """Read a kept result.

    Raises:
        ValueError: The file is not a result.
    """
    try:
        result = json.loads(path.read_text())
        rows = {row["name"]: row for row in result["rows"]}
        for row in rows.values():
            missing = [key for key in NEEDED if key not in row]
            if missing:
                raise ValueError(f"row {row['name']} has no {missing[0]}")
        return {**result, "rows": rows, "failed": {row["name"] for row in result["failed"]}}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path}: {type(error).__name__}: {error}; expected a file of bench/results"
        ) from None


def apart(old: dict, new: dict) -> bool:
    """Whether ``new`` took longer, and the ranges of seconds do not overlap."""
    return new["seconds_percentiles_20_80"][0] > old["seconds_percentiles_20_80"][1]


def slower(old: dict, new: dict) -> bool:
    """Whether ``new`` is slower than ``old``, beyond the noise of both."""
    return apart(old, new) and (
        new["speedup_percentiles_20_80"][1] < old["speedup_percentiles_20_80"][0]
    )


def needs_more(old: dict, new: dict) -> str | None:
    for key in ("peak_mib", "saved_mib_per_image"):
        if key in old and key in new and new[key] > old[key] * (1 + MEMORY_SLACK):
            return f"{key} {old[key]:.3f} → {new[key]:.3f}"
    return None


def milliseconds(old: dict, new: dict) -> str:
    return f"{1e3 * old['median_seconds']:.3f} → {1e3 * new['median_seconds']:.3f} ms"


def regressions(old: dict, new: dict) -> list[str]:
    """A line for each row of both results that became worse or now fails.

    Raises:
        ValueError: The results are from different devices, or have no row in common.
    """
    if old["device"] != new["device"]:
        raise ValueError(
            f"got results of {old['device']} and of {new['device']}, expected one device"
        )
    both = [name for name in old["rows"] if name in new["rows"]]
    if not both:
        raise ValueError("the results have no row in common")
    found = []
    for name in both:
        a, b = old["rows"][name], new["rows"][name]
        if slower(a, b):
            found.append(
                f"slower: {name}: {milliseconds(a, b)}, "
                f"{a['speedup_vs_reference']:.2f} → {b['speedup_vs_reference']:.2f}×"
            )
        if more := needs_more(a, b):
            found.append(f"more memory: {name}: {more}")
    found += [f"fails now: {name}" for name in old["rows"] if name in new["failed"]]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="A", help="a file of bench/results")
    parser.add_argument("new", type=Path, metavar="B", help="a later one of the same device")
    arguments = parser.parse_args()
    try:
        old, new = load(arguments.old), load(arguments.new)
        found = regressions(old, new)
    except ValueError as error:
        print(f"bench.regressions: {error}", file=sys.stderr)
        return 2
    for key in sorted(old["versions"].keys() | new["versions"].keys()):
        a, b = (result["versions"].get(key, "none") for result in (old, new))
        if a != b:
            print(f"note: {key} {a} → {b}")
    for name, row in old["rows"].items():
        later = new["rows"].get(name)
        if row["backend"] in PLAIN and later is not None and apart(row, later):
            print(f"note: plain PyTorch is slower: {name}: {milliseconds(row, later)}")
    for name in sorted(old["rows"].keys() ^ new["rows"].keys()):
        print(f"note: only in {'A' if name in old['rows'] else 'B'}: {name}")
    print("\n".join(found) or "no regression")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
