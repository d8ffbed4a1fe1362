"""Comparisons: the same budget for all models, resuming, and the table of results."""

import csv
import html
import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.text import Annotation, Text

from t2tvit.cli import main
from t2tvit.comparison import plan, results
from t2tvit.comparison.plan import PACKAGED, folder_of, read_comparison
from t2tvit.comparison.scatter import AXES, Measured, Rate, plot
from t2tvit.errors import InputError
from t2tvit.figures import literal_text
from t2tvit.terminal import printable
from tests.support.figure_layout import check_layout

TINY = {
    "data": "synthetic:40",
    "img_size": 32,
    "num_classes": 6,
    "workers": 0,
    "batch_size": 10,
    "epochs": 2,
    "warmup_epochs": 0,
    "cooldown_epochs": 0,
    "device": "cpu",
    "seeds": [3, 1],
    "models": {
        "T2T, tiny": {"model": "t2t_vit_7", "model_args": {"embed_dim": 16, "depth": 1}},
        "ViT": {"model": "vit_s_16", "model_args": {"embed_dim": 16, "depth": 1, "num_heads": 2}},
        "ResNet": {"model": "timm:test_resnet", "drop_path": 0.0},
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_repetition():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "REPETITIONS", 1)
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    command = ["compare", "--config", str(folder / "tiny.yaml"), "--output", str(folder / "out")]
    assert main(command) == 0
    return folder / "out", command


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_every_model_has_its_runs_with_one_budget(compared):
    output, _ = compared
    runs = rows(output / "runs.csv")
    assert {(run["model"], run["seed"]) for run in runs} == {
        (name, seed) for name in TINY["models"] for seed in ("3", "1")
    }
    budgets = set()
    for run in runs:
        place = output / folder_of(run["model"]) / f"seed-{run['seed']}"
        last = json.loads((place / "metrics.jsonl").read_text().splitlines()[-1])
        assert (last["epoch"], round(last["top1"], 4)) == (2, float(run["top1"]))
        config = yaml.safe_load((place / "config.yaml").read_text())
        assert config["seed"] == int(run["seed"])
        for key in (*plan.MODEL_KEYS, "seed"):
            del config[key]
        budgets.add(json.dumps(config, sort_keys=True))
    assert len(budgets) == 1


def test_the_table_has_the_models_costs_and_the_seeds_range(compared):
    output, _ = compared
    models = {row["model"]: row for row in rows(output / "models.csv")}
    # Patches, class token, positions, block, norm and head; T2T's count is the registry's business.
    dim, hidden = 16, 48
    block = 4 * dim * dim + dim + 2 * dim * hidden + hidden + dim + 4 * dim
    vit = (768 + 1) * dim + dim + 5 * dim + block + 2 * dim + (dim + 1) * 6
    assert int(models["ViT"]["parameters"]) == vit
    for name, row in models.items():
        top1 = [float(run["top1"]) for run in rows(output / "runs.csv") if run["model"] == name]
        assert float(row["top1_mean"]) == pytest.approx(sum(top1) / 2, abs=1e-3)
        assert (float(row["top1_least"]), float(row["top1_most"])) == (min(top1), max(top1))
        assert float(row["training_images_per_second"]) > 0
    table = (output / "comparison.md").read_text()
    assert "2 epochs of batches of 10 for every model" in table and "seeds 3, 1" in table
    for name in ("parameters", "macs", "throughput"):
        assert (output / f"accuracy-{name}.png").stat().st_size > 5000


def test_a_stopped_comparison_resumes(compared, capsys):
    output, command = compared
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/*/state-*.safetensors")}
    (output / "models.csv").unlink()
    assert main(command) == 0
    assert before == {
        path: path.stat().st_mtime_ns for path in output.glob("*/*/state-*.safetensors")
    }
    assert rows(output / "models.csv")
    record = (output / "comparison.yaml").read_bytes()
    for change in (("--lr", "0.5"), ("--epochs", "3"), ("--data", "synthetic:48")):
        assert main([*command, *change]) == 2
        assert f"holds a comparison with {change[0][2:]}" in capsys.readouterr().err
    assert (output / "comparison.yaml").read_bytes() == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, "models: got {}, expected a name for each model"),
        (
            {"models": {"a": {"depth": 3}}},
            "models: a: got {'depth': 3}, expected keys including model",
        ),
        ({"models": {"a": {"model": "vit_s_16", "lr": 1}}}, "models: a: unknown key 'lr'"),
        ({"models": {"a b": {"model": "x"}, "a-b": {"model": "y"}}}, "differ only in punctuation"),
        ({"seeds": [1, 1]}, r"seeds: got \[1, 1\], expected different whole numbers"),
        ({"seeds": ["x"]}, "seeds: got 'x', expected a whole number"),
        ({"epoch": 3}, "unknown key 'epoch'"),
    ],
)
def test_bad_comparisons_are_refused(tmp_path, change, message):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(TINY | change))
    with pytest.raises(InputError, match=message):
        read_comparison(str(path), [], None, {})


def test_models_can_be_named_on_the_command_line():
    comparison = read_comparison(None, ["vit_s_16", "timm:resnet18"], [7], {"epochs": "20"})
    assert {name: each.model for name, each in comparison.models.items()} == {
        "vit_s_16": "vit_s_16",
        "timm:resnet18": "timm:resnet18",
    }
    assert comparison.seeds == (7,) and comparison.shared.epochs == 20


def test_the_packaged_comparison_has_the_paper_s_kinds_of_model():
    comparison = read_comparison("digits", [], None, {})
    kinds = {config.model for config in comparison.models.values()}
    assert {"t2t_vit_7", "t2t_vit_t_14", "vit_s_16", "vit_s_16_se", "vit_dense"} <= kinds
    assert {"vit_s_16_resnext", "vit_s_16_ghost", "vit_wide", "timm:resnet10t"} <= kinds
    assert [path.stem for path in PACKAGED.glob("*.yaml")] == ["digits"]


def test_the_documented_results_are_those_of_the_packaged_comparison(tmp_path):
    comparison = read_comparison("digits", [], [0, 1], {"epochs": "12"})
    plan.claim(comparison, tmp_path)
    documented = Path(__file__).parents[2] / "docs" / "comparison" / "comparison.yaml"
    assert (tmp_path / "comparison.yaml").read_text() == documented.read_text()


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        "a | b\n| c |",
        "`code` ``",
        "x](http://example.org) [y](z) ![z](w)",
        "*bold* __strong__ ~~gone~~ $x$ \\| a_b",
        "&lt; https://example.org www.example.org a@example.org \x1b[31m",
    ],
)
def test_names_are_not_markup_in_the_table(name):
    row = Measured(name, 1, 1, [50.0], Rate(1, 1, 1), Rate(1, 1, 1))
    text = results.markdown([row], [f"imagefolder:{name} at 32"])
    head, _, line, blank, note, *_ = text.splitlines()
    assert line.count("|") == head.count("|") and blank == "" and note.startswith("- imagefolder")
    for shown in (line.split(" | ")[0].removeprefix("| "), note.removeprefix("- imagefolder:")):
        assert not set("<>|`*[]~$@\x1b\n") & set(shown) and "//" not in shown.replace("&#58;//", "")
        assert "__" not in shown and "www." not in shown
        # A browser or Markdown viewer shows the characters that the terminal gets.
        assert html.unescape(shown).startswith(printable(name))


def test_a_model_that_cannot_run_is_reported_before_anything_is_written(tmp_path, capsys):
    command = ["compare", "vit_s_16", "timm:no_such_model", "--output", str(tmp_path / "out")]
    assert main([*command, "--data", "synthetic:8", "--num-classes", "3"]) == 2
    assert "no_such_model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Plots


def measured(count: int, name: str = "model") -> list[Measured]:
    """Models in a few clusters."""
    random = np.random.default_rng(count)
    rows = []
    for number in range(count):
        size = int(10 ** random.choice([5.5, 6, 6.02]) * random.uniform(1, 1.02))
        top1 = list(random.choice([90, 99.5]) + random.uniform(-1, 0.5, 3))
        rate = Rate(size / 100, size / 110, size / 90)
        rows.append(Measured(f"{name} {number}", size, 7 * size, top1, rate, rate))
    return rows


@pytest.mark.parametrize("name", ["T2T", "a long name, which says all of its options", "$\\frac{$"])
@pytest.mark.parametrize("count", [1, 14])
def test_names_cover_neither_each_other_nor_points(name, count):
    rows = measured(count, name)
    with literal_text([name]):
        for label, value in AXES.values():
            figure = plot(rows, label, value)
            check_layout(figure)
            (axes,) = figure.axes
            names = [text for text in axes.texts if isinstance(text, Annotation)]
            assert len(names) == count
            for row in rows:
                for y in (min(row.top1), statistics.mean(row.top1), max(row.top1)):
                    point = axes.transData.transform((value(row), y))
                    assert not any(Text.get_window_extent(text).contains(*point) for text in names)


def test_a_narrow_range_has_ticks():
    rows = measured(3)
    for number, row in enumerate(rows):
        rows[number] = replace(row, parameters=710_000 + number, top1=[100.0])
    with literal_text():
        figure = plot(rows, *AXES["parameters"])
        check_layout(figure)
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 3
    assert axes.get_ylim()[1] <= 101
