"""Measurements on a simulated GPU: times are those of the device, and launches count kernels."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench import resources, tune
from t2t_kernels import measure

CUDA = torch.device("cuda")


class Gpu:
    """Runs launches in order; the clocks of the host and the GPU advance together."""

    def __init__(self, monkeypatch):
        self.host = self.free = 0.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def launch(self, seconds, to_launch):
        self.host += to_launch
        self.free = max(self.free, self.host) + seconds

    def wait(self):
        self.host = max(self.host, self.free)

    def sleep(self, cycles):
        self.launch(cycles / 1.5e9, 1e-6)


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.gpu.launch(0.0, 1e-6)
        self.at = self.gpu.free

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.mark.parametrize("launches, to_launch", [(1, 20e-6), (30, 20e-6), (300, 30e-6)])
def test_short_calls_are_measured_on_the_device(monkeypatch, launches, to_launch):
    """Kernels of 5 µs whose launches take the host 20 and 30 µs."""
    gpu = Gpu(monkeypatch)

    def call():
        for _ in range(launches):
            gpu.launch(5e-6, to_launch)

    measure.seconds_per_call(call, 1, CUDA)
    # The first of several calls shows how long the host takes.
    got = measure.seconds_per_call(call, 40, CUDA)
    assert got == pytest.approx(launches * 5e-6, rel=0.2)


def test_measuring_short_calls_respects_the_time_limit(monkeypatch):
    """Holding back the GPU takes far longer than the call itself."""
    gpu = Gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: gpu.wait())
    functions = {"short": lambda: gpu.launch(5e-6, 20e-6)}
    taken = measure.interleave(functions, 5, CUDA, seconds=0.1)
    assert taken["short"] == pytest.approx([5e-6] * 5, rel=0.2)
    assert gpu.host < 1.0


def test_annotations_do_not_count_as_launches(monkeypatch):
    events = [
        SimpleNamespace(device_type=DeviceType.CUDA, is_user_annotation=False),
        SimpleNamespace(device_type=DeviceType.CUDA, is_user_annotation=True),
        SimpleNamespace(device_type=DeviceType.CPU, is_user_annotation=False),
    ]

    class Profile:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return SimpleNamespace(events=lambda: events)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(resources, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    assert resources.launches(lambda: None, CUDA) == 1


def test_tuning_respects_its_time_limit(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tune, "steps", lambda *_: {})

    def seconds(field, is_float32, candidate, runs):
        now[0] += 10
        return candidate.block_t * 1e-3 if is_float32 else None

    monkeypatch.setattr(tune, "seconds", seconds)
    assert not tune.tune(["project", "attention"], ["bf16", "fp32"], 200)
    assert now[0] <= 240
    out = capsys.readouterr().out
    assert out.count("no time for") == 4 and "attention, fp32" in out
    assert tune.tune(["project"], ["fp32"], 1000)


def test_tuning_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(tune, "DEVICE", torch.device("cpu"))
    with pytest.raises(SystemExit) as ended:
        tune.main(["--dtypes", "bf16"])
    assert ended.value.code == 2 and "no CUDA device" in capsys.readouterr().err
