"""The plots of a result as PNG files: speed-ups, roofline, memory against batch."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from bench.kept_results import COPY, OURS, PLAIN, PRODUCTS, group
from t2tvit.figures import drawable, fitted, literal_text
from t2tvit.files import write_figure

# Distinguishable with any colour vision.
OURS_COLOR, RIVAL_COLOR, PLAIN_COLOR = "#0072B2", "#E69F00", "#777777"
DTYPE_COLORS = {"fp32": "#D55E00", "bf16": "#0072B2"}
MARKERS = "osD^vP*X<>hpd8"
TITLE_SIZE = 10  # points


def draw(result: dict, path: Path) -> list[Path]:
    """Draw every plot that ``result`` has figures for, named after ``path``; returns the files."""
    written = []
    with literal_text([result["device"]]):
        for name, plot in (("speedup", speedup), ("roofline", roofline), ("memory", memory)):
            figure = plot(result)
            if figure is not None:
                file = path.with_name(f"{path.stem}-{name}.png")
                write_figure(file, figure, dpi=100)
                written.append(file)
    return written


def entitle(figure: Figure, title: str) -> None:
    """Write ``title`` above the figure, in as many lines as it needs."""
    width = 72 * (figure.get_figwidth() - 0.3)
    figure.suptitle(fitted(drawable(title), width, TITLE_SIZE, lines=3), fontsize=TITLE_SIZE)


def speedup(result: dict) -> Figure | None:
    """A bar per row of full passes: the speed relative to the reference."""
    rows = [
        row
        for row in result["rows"]
        if row["pass"] in ("full", "training") and row["backend"] not in PLAIN
    ]
    if not rows:
        return None
    names = list(dict.fromkeys(group(row) for row in rows))
    figure = Figure(figsize=(9, 1.2 + 0.2 * len(rows) + 0.12 * len(names)), layout="constrained")
    axes = figure.subplots()
    position, ticks = 0.0, []
    for name in names:
        for row in (row for row in rows if group(row) == name):
            low, high = row["speedup_percentiles_20_80"]
            middle = row["speedup_vs_reference"]
            color = OURS_COLOR if row["backend"] in OURS else RIVAL_COLOR
            axes.barh(position, middle, height=0.8, color=color)
            axes.plot([low, high], [position, position], color="black", linewidth=1)
            ticks.append((position, f"{name}-{row['backend']}"))
            position += 1
        position += 0.6
    axes.axvline(1, color=PLAIN_COLOR, linewidth=1)
    axes.set_yticks(*zip(*ticks), fontsize=7)
    axes.set_ylim(position - 0.1, -0.9)
    entitle(
        figure,
        "Speed relative to the reference, median with 20th and 80th percentile: "
        f"{result['device']}",
    )
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for color, label in ((OURS_COLOR, "ours"), (RIVAL_COLOR, "rivals")):
        axes.barh(0, 0, color=color, label=label)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    return figure


def roofline(result: dict) -> Figure | None:
    """A point for each kernel of full passes, below the measured ceilings of the device."""
    rows = [
        row
        for row in result["rows"]
        if row["pass"] == "full" and row["backend"] in OURS and row.get("tflops")
    ]
    if not rows:
        return None
    bandwidth = result["ceilings"][COPY] / 1e3
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots()
    intensities = [row["flops"] / row["minimum_bytes"] for row in rows]
    left, right = min(intensities) / 3, max(intensities) * 3
    for dtype in sorted({row["dtype"] for row in rows}):
        top = result["ceilings"][PRODUCTS[dtype]]
        knee = top / bandwidth
        points = sorted({left, min(max(knee, left), right), right})
        axes.plot(
            points,
            [min(top, bandwidth * x) for x in points],
            color=DTYPE_COLORS[dtype],
            label=f"{dtype}: large product {top:.3g} TFLOP/s, copy {1e3 * bandwidth:.3g} GB/s",
        )
    kinds = list(dict.fromkeys(f"{row['op']}-{row['size']}" for row in rows))
    for row, x in zip(rows, intensities, strict=True):
        kind = f"{row['op']}-{row['size']}"
        axes.plot(
            x,
            row["tflops"],
            MARKERS[kinds.index(kind) % len(MARKERS)],
            color=DTYPE_COLORS[row["dtype"]],
        )
    for kind, marker in zip(kinds, MARKERS * 2):
        axes.plot([], [], marker, color=PLAIN_COLOR, label=kind)
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s")
    axes.set_xlabel("FLOP of matrix products per byte of inputs and outputs")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_formatter("{x:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter("")
    entitle(figure, f"Throughput of forward and backward: {result['device']}")
    axes.grid(alpha=0.25, which="both")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    return figure


def memory(result: dict) -> Figure | None:
    """Memory of a training step against images per batch, for ours and plain PyTorch."""
    rows = [row for row in result["rows"] if "memory_mib_by_batch" in row]
    # Only one dtype is shown: bfloat16 if there is one.
    dtypes = {row["dtype"] for row in rows}
    rows = [row for row in rows if row["dtype"] == ("bf16" if "bf16" in dtypes else "fp32")]
    if not rows:
        return None
    names = list(dict.fromkeys(row["op"] for row in rows))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.8 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    what = "Peak memory" if "peak_mib" in rows[0] else "Memory saved for the backward pass"
    entitle(figure, f"{what} of a training step (MiB, {rows[0]['dtype']}): {result['device']}")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, names):
        shown = [row for row in rows if row["op"] == name]
        shown.sort(key=lambda row: row["memory_mib_by_batch"][-1])
        for row in {row["backend"]: row for row in shown}.values():  # each at its largest batch
            color = OURS_COLOR if row["backend"] in OURS else PLAIN_COLOR
            batches, mib = zip(*row["memory_mib_by_batch"], strict=True)
            axes.plot(batches, mib, "o-", color=color, label=row["backend"])
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("images per batch")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    return figure
