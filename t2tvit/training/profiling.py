"""``--profile``: a trace of some updates, and a summary of it that fits a screen."""

import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from t2tvit.files import write_atomically
from t2tvit.training.distributed import World

TRACE_FILE = "profile.json.gz"
SUMMARY_FILE = "profile.txt"
# The first updates compile, tune and allocate; the first ones with the profiler are slow too.
SKIPPED, WARM_UP = 3, 2
PARTS = ("wait for the loader", "augment", "forward", "backward", "optimiser")
LINES = 12


class Profiler:
    """Profiles ``updates`` updates of rank 0 once; does nothing if ``updates`` is 0.

    Args:
        output: The folder for TRACE_FILE and SUMMARY_FILE.
        updates: How many to record.
        world: Other ranks do nothing.
    """

    def __init__(self, output: Path, updates: int, world: World):
        self.output, self.updates, self.world = output, updates, world
        self.left = SKIPPED + WARM_UP + updates if updates and world.is_main else 0
        if self.left:
            activities = [ProfilerActivity.CPU]
            if world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self.profile = profile(
                activities=activities,
                schedule=schedule(
                    skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=updates, repeat=1
                ),
                on_trace_ready=self._write,
            )
            self.profile.start()

    def after_step(self) -> None:
        """Count an update; after the last one to profile, write and print the results."""
        if self.left:
            self.left -= 1
            self.profile.step()
            if not self.left:
                self.profile.stop()

    def close(self, failed: bool = False) -> None:
        """Stop recording; unless the run ``failed``, warn if it was too short to be profiled."""
        if not self.left:
            return
        left, self.left = self.left, 0
        self.profile.on_trace_ready = None
        self.profile.stop()
        if not failed:
            self.world.say(
                f"warning   no profile: it needs {SKIPPED + WARM_UP + self.updates} updates, {left} "
                "more than the run made",
            )

    def _write(self, done: profile) -> None:
        # The profiler's writer ignores a full disk.
        with tempfile.NamedTemporaryFile(suffix=".json.gz") as trace:
            done.export_chrome_trace(trace.name)
            write_atomically(self.output / TRACE_FILE, Path(trace.name).read_bytes())
        text = summary(done, self.updates, self.world.device)
        write_atomically(self.output / SUMMARY_FILE, text + "\n")
        for line in text.splitlines():
            self.world.say(line)
        self.world.say(f"          the trace is {self.output / TRACE_FILE}, for ui.perfetto.dev")


def summary(done: profile, updates: int, device: torch.device) -> str:
    """The time of the recorded updates: on the host by part, on the device by kernel."""
    events = done.key_averages()
    host = {event.key: event.cpu_time_total for event in events if event.key in PARTS}
    whole = sum(host.values())
    shares = ", ".join(f"{part} {host.get(part, 0) / whole:.0%}" for part in PARTS)
    on_gpu = device.type == "cuda"

    def own_time(event) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    busiest = sorted(
        (event for event in events if event.key not in PARTS), key=own_time, reverse=True
    )
    total = sum(own_time(event) for event in busiest)
    lines = [
        f"profile   {updates} updates, {whole / updates / 1000:,.1f} ms of the host each: {shares}",
        f"          {'own time, ms per update':>24}{'share':>7}{'calls':>8}  on {device.type}",
    ]
    for event in busiest[:LINES]:
        time, share = own_time(event) / updates / 1000, own_time(event) / max(total, 1)
        lines.append(
            f"          {time:>24,.2f}{share:>7.0%}{event.count / updates:>8,.0f}  {event.key[:50]}"
        )
    return "\n".join(lines)
