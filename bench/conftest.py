"""The options and rows of ``pytest bench/``, and a table of speed-ups at the end."""

import platform
import time

import pytest
import torch

from bench.kept_results import COPY, PRODUCTS
from bench.kernel_rows import DEVICE, DTYPES
from t2t_kernels.measure import copy_ceiling, matmul_ceiling
from t2t_kernels.shadowing import why_shadowed
from t2tvit.training.progress import duration

FAILED = pytest.StashKey[list]()
SECONDS_BETWEEN_LINES = 30


def pytest_addoption(parser):
    group = parser.getgroup("bench/")
    group.addoption(
        "--batch",
        type=int,
        metavar="N",
        help="images per call (default: depends on the device; 1 with --benchmark-disable)",
    )
    group.addoption(
        "--compiled",
        action="store_true",
        help="also rivals with torch.compile; compiling takes seconds to minutes for each",
    )
    group.addoption(
        "--memory",
        type=float,
        metavar="GIB",
        help="also the largest batch that each model can train with in this much memory",
    )


def pytest_configure(config):
    if (shadowed := why_shadowed()) is not None:
        raise pytest.UsageError(shadowed)
    config.stash[FAILED] = []
    config.pluginmanager.register(Progress(config), "bench-progress")
    option = config.option
    option.smoke = option.benchmark_disable
    if option.batch is None and option.smoke:
        option.batch = 1
    if option.batch is not None and option.batch < 1:
        raise pytest.UsageError(f"--batch: got {option.batch}, expected at least 1")


class Progress:
    """Prints regularly how many rows are done and an estimate of the time left."""

    def __init__(self, config):
        self.config, self.done = config, 0
        self.started = self.said = time.monotonic()

    def pytest_collection_finish(self, session):
        self.rows = len(session.items)
        self.started = self.said = time.monotonic()

    def pytest_runtest_logfinish(self):
        self.done += 1
        now = time.monotonic()
        if self.done < self.rows and now - self.said >= SECONDS_BETWEEN_LINES:
            self.said = now
            taken = now - self.started
            left = taken / self.done * (self.rows - self.done)
            reporter = self.config.pluginmanager.get_plugin("terminalreporter")
            reporter.ensure_newline()
            reporter.write_line(
                f"{self.done} of {self.rows} rows in {duration(taken)}, about {duration(left)} left"
            )


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        rows = metafunc.module.rows(metafunc.config.option)
        metafunc.parametrize("row", rows, ids=[row.name for row in rows])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and hasattr(item, "callspec"):
        reason = str(call.excinfo.value).strip().partition("\n")[0]
        row = {"name": item.callspec.id, "reason": f"{call.excinfo.typename}: {reason}"}
        item.config.stash[FAILED].append(row)
    return report


@pytest.fixture
def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"


def pytest_benchmark_update_json(config, benchmarks, output_json):
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    output_json["t2t"] = {
        "threads": torch.get_num_threads(),
        "versions": versions,
        "ceilings": {
            COPY: copy_ceiling(DEVICE) / 1e9,
            **{
                name: matmul_ceiling(DEVICE, DTYPES[dtype]) / 1e12
                for dtype, name in PRODUCTS.items()
            },
        },
        "failed": config.stash[FAILED],
    }


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = [bench for bench in getattr(session, "benchmarks", []) if bench.extra_info]
    rows = [row for row in rows if row.extra_info.get("backend") != "reference"]
    rows = [row for row in rows if "speedup_vs_reference" in row.extra_info]
    if not rows:
        return
    terminalreporter.section("relative to the reference, in turns in one process")
    width = max(len(row.name) for row in rows)
    for row in rows:
        info = row.extra_info
        low, high = info["speedup_percentiles_20_80"]
        terminalreporter.write_line(
            f"{row.name:<{width}}  {info['speedup_vs_reference']:6.2f}× "
            f"({low:.2f}–{high:.2f})  median {row.stats.median * 1e3:9.3f} ms"
        )
