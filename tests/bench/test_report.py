"""From runs to tables, plots and comparisons."""

import copy
import json
import sys
from pathlib import Path

import pytest

from bench import gpu_report, kept_results, regressions, report

ROOT = Path(__file__).parents[2]


def row(name, backend, speedup=1.0, seconds=1.0, **info):
    return {
        "name": f"{name}-{backend}",
        "op": name.split("-")[0],
        "size": "L1",
        "backend": backend,
        "dtype": "bf16",
        "pass": "full",
        "median_seconds": seconds,
        "seconds_percentiles_20_80": [0.95 * seconds, 1.05 * seconds],
        "speedup_vs_reference": speedup,
        "speedup_percentiles_20_80": [0.95 * speedup, 1.05 * speedup],
        "saved_mib_per_image": 4.0,
        "first_call_seconds": 2.0,
        "flops": 10**9,
        "minimum_bytes": 10**7,
        "tflops": 1e-3 / seconds,
        "gb_per_second": 1e-2 / seconds,
        "ceiling_tflops": 0.1,
        "ceiling_gb_per_second": 10.0,
        **info,
    }


@pytest.fixture
def result():
    layer, model = "performer_layer-L1-B4-bf16-full", "t2t_vit_7-224-B4-bf16-training"
    speed = {
        "images_per_second": 4.0,
        "images_per_second_percentiles_20_80": [3.8, 4.2],
        "mfu": 0.4,
    }
    training = {"pass": "training", **speed, "memory_mib_by_batch": [[1, 9.0], [4, 36.0]]}
    return {
        "device": "A processor, 2 threads",
        "date": "2026-01-02",
        "versions": {"torch": "2.11"},
        "ceilings": {
            "copy, GB/s": 10.0,
            "float32 products, TFLOP/s": 0.05,
            "bfloat16 products, TFLOP/s": 0.1,
        },
        "rows": [
            row(layer, "reference", saved_mib_per_image=9.0),
            row(layer, "cpu", 2.0, 0.5),
            row(layer, "compile", 1.5, 0.7),
            row(layer, "convolution", 1.75, 0.6),
            row(model, "reference", **training),
            row(model, "fused", 1.25, 0.8, **training, largest_batch=64, largest_batch_gib=16.0,
                largest_batch_is="extrapolated"),
        ],
        "failed": [{"name": "soft_split-L1-B4-bf16-full-cpu", "reason": "ParityError: off by 1"}],
    }  # fmt: skip


# Report


def test_no_row_is_faster_than_its_ceiling_because_the_machine_was_busy(result):
    rows = [
        row("a", "cpu", dtype="fp32", tflops=0.07, ceiling_tflops=0.06, mfu=7 / 6),
        row("b", "cpu", dtype="fp32", tflops=0.06, ceiling_tflops=0.08),
    ]
    lower = {name: value / 2 for name, value in result["ceilings"].items()}
    ceilings = kept_results.share_ceilings(rows, [result["ceilings"], lower])
    assert ceilings == result["ceilings"] | {"float32 products, TFLOP/s": 0.08}
    assert [each["ceiling_tflops"] for each in rows] == [0.08, 0.08]
    assert rows[0]["mfu"] == pytest.approx(7 / 8)


def test_the_summary_shows_the_best_rival(result):
    text = report.summary(result)
    assert (
        "| `performer_layer-L1-B4-bf16-full-cpu` | 2.00× (1.90–2.10) | 1.75× convolution | "
        "4.00 (reference 9.00) |"
    ) in text
    assert (
        "`t2t_vit_7-224-B4-bf16-training-fused` | 4 (3.8–4.2) | 40.0% | 1.25× (1.19–1.31)" in text
    )
    assert "| 64 |" in text and "largest batch in 16 GiB, extrapolated" in text
    assert "Failed, not timed: `soft_split-L1-B4-bf16-full-cpu`: ParityError" in text
    assert "copy, GB/s 10" in text
    assert report.every_row(result).count("\n") == 1 + len(result["rows"])


def test_a_result_is_kept_with_its_tables_and_plots(result, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_results, "RESULTS", tmp_path)
    path = kept_results.keep(result)
    assert path == tmp_path / "a-processor-2-threads" / "2026-01-02.json"
    assert kept_results.keep(result) == path  # the same rows again
    report.publish(path)
    text = path.with_suffix(".md").read_text()
    for plot in ("speedup", "roofline", "memory"):
        file = path.with_name(f"2026-01-02-{plot}.png")
        assert file.read_bytes().startswith(b"\x89PNG") and file.name in text
    assert kept_results.newest() == [path]


def test_a_run_of_some_rows_leaves_the_others(result, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_results, "RESULTS", tmp_path)
    first = kept_results.keep(result)
    layer, reference = result["rows"][1], result["rows"][0]
    again = row("performer_layer-L1-B4-bf16-full", "cpu", 3.0, 0.3)
    second = kept_results.keep(result | {"rows": [reference, again], "failed": []})
    assert second == first.with_name("2026-01-02-2.json") and kept_results.newest() == [second]
    later = kept_results.keep(
        result | {"rows": [reference | {"name": "b"}], "failed": [], "date": "2026-01-10"}
    )
    assert kept_results.newest() == [later]
    # Rows of plain PyTorch alone have no table.
    assert [path for path, *_ in report.shown()] == [second, first]
    page = report.updated(f"head\n{report.BEGIN}\n{report.END}\ntail\n", report.summary)
    assert page.count(layer["name"]) == 1 and "3.00× (2.85–3.15)" in page
    assert "`t2t_vit_7-224-B4-bf16-training-fused`" in page


@pytest.mark.parametrize("device", ["A GPU", "a $GPU$ with a long name " * 9])
@pytest.mark.parametrize("plot", ["speedup", "roofline", "memory"])
def test_the_text_of_plots_does_not_overlap(plot, device, result):
    pytest.importorskip("matplotlib", reason="needs matplotlib", exc_type=ImportError)
    from bench import plots
    from t2tvit.figures import literal_text
    from tests.support.figure_layout import check_layout, texts

    committed = json.loads(kept_results.newest()[0].read_text())
    for each in (result, committed):
        with literal_text():
            figure = getattr(plots, plot)(each | {"device": device})
            check_layout(figure)
            assert not any("mathdefault" in text.get_text() for text in texts(figure))


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_tables_are_those_generated_from_the_committed_results(page):
    text = page.read_text()
    assert report.updated(text, report.PAGES[page]) == text, "run python -m bench.report"


def test_readme_table_shows_the_largest_batch_beside_plain_pytorch(result):
    assert report.headlines(result, {row["name"] for row in result["rows"]}) == ""
    for batch in (4, 16, 8):
        name = f"performer_module-224-B{batch}-fp32-full"
        sizes = {"op": "performer_module", "dtype": "fp32", "shape": [batch, 3, 224, 224]}
        result["rows"] += [
            row(name, "reference", **sizes | {"saved_mib_per_image": 9.0}),
            row(name, "fused", batch / 10, **sizes),
        ]
    lines = report.headlines(result, {row["name"] for row in result["rows"]}).splitlines()
    assert lines[0] == "**A processor, 2 threads**, torch 2.11, 2026-01-02, 224×224:"
    assert lines[-1].endswith("| fp32 | 16 | 1.60× | 4.0 | 9.0 |") and len(lines) == 5
    assert report.headlines(result, set()) == ""


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "FileNotFoundError"),
        ("{", "expected what pytest bench/ --benchmark-json writes"),
        ('{"benchmarks": []}', "KeyError: 't2t'"),
        ('{"benchmarks": [], "t2t": {}}', "IndexError"),
    ],
)
def test_files_that_are_not_runs_are_refused(content, message, tmp_path, capsys, monkeypatch):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["report", "--output", str(tmp_path / "out"), str(path)])
    assert report.main() == 2
    assert f"bench.report: {path}" in (err := capsys.readouterr().err) and message in err
    assert not (tmp_path / "out").exists()


# Compare


@pytest.fixture
def compared(result, tmp_path, capsys, monkeypatch):
    """Compare ``result`` with itself after a change: exit status, output, errors."""

    def run(change=lambda later: None):
        later = copy.deepcopy(result)
        change(later)
        paths = [tmp_path / "a.json", tmp_path / "b.json"]
        for path, content in zip(paths, (result, later), strict=True):
            path.write_text(json.dumps(content))
        monkeypatch.setattr(sys, "argv", ["regressions", *map(str, paths)])
        status = regressions.main()
        return status, *capsys.readouterr()

    return run


def scale(row, key, factor):
    row[f"{key}_percentiles_20_80"] = [factor * x for x in row[f"{key}_percentiles_20_80"]]


def test_equal_results_have_no_regression(compared):
    assert compared() == (0, "no regression\n", "")


def test_slower_beyond_the_noise_is_a_regression(compared):
    def slower(later):
        scale(later["rows"][1], "seconds", 1.3)
        scale(later["rows"][1], "speedup", 1 / 1.3)

    status, out, _ = compared(slower)
    assert status == 1 and "slower: performer_layer-L1-B4-bf16-full-cpu: " in out


def test_a_slower_plain_pytorch_is_noted(compared):
    status, out, _ = compared(lambda later: scale(later["rows"][0], "seconds", 1.3))
    assert status == 0
    assert "note: plain PyTorch is slower: performer_layer-L1-B4-bf16-full-reference: " in out


@pytest.mark.parametrize("factors", [(1.05, 1 / 1.05), (1.3, 1.0), (1.0, 1 / 1.3)])
def test_noise_a_slower_machine_and_a_faster_reference_are_not_regressions(compared, factors):
    def change(later):
        scale(later["rows"][1], "seconds", factors[0])
        scale(later["rows"][1], "speedup", factors[1])

    assert compared(change)[0] == 0


def test_memory_and_failures_are_regressions(compared):
    def change(later):
        later["rows"][1]["saved_mib_per_image"] *= 1.1
        later["failed"].append({"name": later["rows"].pop(2)["name"], "reason": "ParityError"})

    status, out, _ = compared(change)
    assert status == 1
    assert (
        "more memory: performer_layer-L1-B4-bf16-full-cpu: saved_mib_per_image 4.000 → 4.400" in out
    )
    assert "fails now: performer_layer-L1-B4-bf16-full-compile" in out


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda later: later.update(device="another"), "expected one device"),
        (lambda later: later["rows"].clear(), "no row in common"),
        (lambda later: later.pop("rows"), "KeyError: 'rows'"),
        (lambda later: later["rows"][0].pop("seconds_percentiles_20_80"), "has no seconds_"),
    ],
)
def test_results_that_cannot_be_compared_give_status_2(compared, change, message):
    status, out, err = compared(change)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1


# make gpu-report


def script(name, source, seconds=60, timed=True):
    return gpu_report.Part(name, ("-c", source), seconds, timed=timed)


WRITES = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("what there is")
"""


def test_a_part_that_fails_or_hangs_does_not_affect_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        gpu_report,
        "parts",
        lambda full, folder: [
            script("aborts", "import os; os.abort()", timed=False),
            script("hangs", "import time; time.sleep(60)", 1, timed=False),
            script("tests", "print('=== 3 passed, 1 skipped in 0.12s ===')"),
            script("writes", WRITES, 3),
        ],
    )
    assert gpu_report.measure(tmp_path, False) == 1
    out = capsys.readouterr().out
    assert "aborts: exit status -6" in out and "hangs: stopped: time limit reached" in out
    assert "tests: done in" in out and "3 passed, 1 skipped" in out
    # Told to stop, it has time to write what it has.
    assert "writes: stopped: time limit reached" in out
    assert "what there is" in (tmp_path / "log.txt").read_text()
    # No row was measured, and the report says so.
    assert "no RUN.json was given" in (tmp_path / "log.txt").read_text()


def test_no_part_starts_without_time_left():
    assert gpu_report.run(script("late", "print()"), 0)[0].startswith("not started")


def test_the_last_table_has_at_most_60_lines(result):
    lines = [("build", "done in 80 s"), ("parity", "exit status 1 in 9 s: 1 failed, 3 passed")]
    text = gpu_report.table(lines, result)
    assert text.splitlines()[0] == "build   done in 80 s"
    assert "FAILED soft_split-L1-B4-bf16-full-cpu: ParityError" in text
    result["rows"] *= 30
    text = gpu_report.table(lines, result).splitlines()
    assert len(text) == 60 and text[-1].startswith("... and ")


def test_every_part_is_a_command_that_exists(tmp_path):
    for full in (False, True):
        chosen = gpu_report.parts(full, tmp_path)
        assert len({part.name for part in chosen}) == len(chosen)
        files = {word for part in chosen for word in part.arguments if word.endswith(".py")}
        assert all((ROOT / name).exists() for name in files)
        names = {part.name for part in chosen}
        for name in gpu_report.OPERATIONS:
            parity = {f"parity {name} {dtype}" for dtype in gpu_report.PARITY}
            assert parity | {f"bench {name}"} <= names


def test_the_parts_share_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "memory_checker", lambda: "compute-sanitizer")
    turns = gpu_report.in_turn(gpu_report.parts(False, tmp_path))
    group, after = turns[0]
    assert after + group[0].least <= gpu_report.BUDGET - gpu_report.REPORT_SECONDS
    assert all(part.least <= part.seconds for group, _ in turns for part in group)
    assert turns[-1][1] == 0
    # Whatever a part takes, those after it have what they need at least.
    assert turns[2][0][0].name.startswith("parity")
    assert turns[2][1] == sum(max(part.least for part in group) for group, _ in turns[3:])


def test_every_parity_test_is_in_one_part():
    for name, expected in {
        "test_parity[usual-float32-triton]": "float32",
        "test_parity[usual-float16-cuda]": "float16",
        "test_parity[usual-bfloat16-cuda]": "bfloat16",
        "test_determinism[triton]": "others",
    }.items():
        chosen = [
            dtype
            for dtype, words in gpu_report.PARITY.items()
            if all(
                (word.removeprefix("not ") in name) != word.startswith("not ")
                for word in words.split(" and ")
            )
        ]
        assert chosen == [expected], name


def test_a_failed_cuda_build_is_reported_and_the_rest_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report, "CUDA_LIBRARY", tmp_path / "_cuda.so")
    monkeypatch.setattr(
        gpu_report, "parts", lambda *_: [script("build", "print(1)"), script("next", "print(2)")]
    )
    assert gpu_report.measure(tmp_path, False) == 1
    out = capsys.readouterr().out
    assert (
        "CUDA library  not built, see log.txt; measured without it" in out and "next: done" in out
    )


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--output", str(tmp_path / "out")])
    assert gpu_report.main() == 2
    err = capsys.readouterr().err
    assert "sees no CUDA device" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
