"""A table at the end of ``pytest bench/`` that says what each backend gained."""


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = [bench for bench in getattr(session, "benchmarks", []) if bench.extra_info]
    rows = [row for row in rows if row.extra_info.get("backend") != "reference"]
    rows = [row for row in rows if "speedup_vs_reference" in row.extra_info]
    if not rows:
        return
    terminalreporter.section("against the reference, in turns in one process")
    width = max(len(row.name) for row in rows)
    for row in rows:
        info = row.extra_info
        low, high = info["speedup_percentiles_20_80"]
        terminalreporter.write_line(
            f"{row.name:<{width}}  {info['speedup_vs_reference']:6.2f}× "
            f"({low:.2f}–{high:.2f})  median {row.stats.median * 1e3:9.3f} ms"
        )
