"""A run: assembled from its configuration, trained, what it learns kept."""

import contextlib
import fcntl
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from t2tvit.charts import draw_curves
from t2tvit.data.sources import Split
from t2tvit.errors import InputError, NonFiniteLoss, RunError
from t2tvit.files import WRITING, read_bytes, read_text, set_aside, write_atomically
from t2tvit.training.build import (
    build_model,
    check_classes,
    describe_device,
    load_weights,
    speed_up,
    try_batch_norm,
    try_forward,
)
from t2tvit.training.config import RunConfig, from_dict, resolve
from t2tvit.training.distributed import World
from t2tvit.training.engine import evaluate, train_epoch
from t2tvit.training.form import check_optimizer
from t2tvit.training.identity import (
    MAY_CHANGE,
    REMEDIES,
    check_data,
    check_owner,
    described,
    difference,
    identity,
    is_identity,
)
from t2tvit.training.keeper import (
    Keeper,
    Signals,
    find_state,
    obeying,
    read_resumable,
    remove_oldest,
    state_name,
    states_in,
    write_state,
)
from t2tvit.training.log import (
    closing_lines,
    epoch_line,
    git_commit,
    loader_line,
    opening_lines,
    versions,
)
from t2tvit.training.optimiser import build_optimizer
from t2tvit.training.pipeline import Data, is_stream, open_data, open_splits
from t2tvit.training.profiling import Profiler
from t2tvit.training.progress import Forecast, Progress
from t2tvit.training.rewind import fitting, rewind
from t2tvit.training.state import (
    BEST_FILE,
    CONFIG_FILE,
    CURVES_FILE,
    LAST_FILE,
    METRICS_FILE,
    RUN_FILE,
    TrainState,
    Weights,
    read_about,
    save_weights,
    seed_everything,
    set_rng_state,
)
from t2tvit.training.trackers import Trackers, check_trackers

NOT_FINITE_FILES = "not_finite-*.safetensors"
CURVES_EVERY = 60  # seconds
LOCK_PATIENCE = 10  # seconds; the loader processes of a killed run hold its lock until they end
EVALUATION_COST = 1 / 3  # of an image, compared with its part of an update: the forward pass alone


@dataclass(frozen=True)
class Place:
    """Where a run writes, what ``--resume`` said, and the state file to resume from, if any.

    ``damaged`` says why newer states cannot be read; ``before`` is the :func:`listing` of ``output``.
    """

    output: Path
    resume: str | None
    state_path: Path | None
    damaged: list[str]
    before: tuple

    @property
    def moves(self) -> bool:
        """Whether the run resumes in another folder than the state's."""
        source = self.state_path
        return source is not None and source.parent.resolve() != self.output.resolve()


def find_place(output: Path | None, resume: str | None) -> Place:
    """What ``--output`` and ``--resume`` mean."""
    source = None if resume in (None, "auto") else Path(resume)
    if source is not None:
        output = output or (source if source.is_dir() else source.parent)
    if output is None:
        raise InputError("--output: none given; name the folder that the run may write to")
    before = listing(output)  # before any of it is read
    if source is not None and source.is_file():
        return Place(output, resume, source, [], before)
    path, damaged = (None, []) if resume is None else find_state(source or output)
    if source is not None and path is None:
        raise InputError(f"--resume: {resume} does not exist or holds no training state")
    if resume == "auto" and path is None:
        beginning = read_record(output).get("beginning")
        if beginning is not None and beginning["state"] is not None:
            path = Path(beginning["state"])  # interrupted before it was copied
    return Place(output, resume, path, damaged, before)


def listing(output: Path) -> tuple:
    """What changes in a folder whenever a run starts or saves there: its states and RUN_FILE."""
    try:
        record = read_bytes(output / RUN_FILE)
    except OSError:
        record = None
    return [path.name for path in states_in(output)], record


def choose_config(name: str | None, overrides: dict, place: Place) -> RunConfig:
    """The configuration of a new or resumed run.

    A resumed run may change the keys in MAY_CHANGE, and those in REMEDIES that ``overrides`` sets.
    Without ``name``, it keeps its own configuration. A new run without ``name`` uses the packaged
    ``digits`` if its data are the digits or not given.
    """
    if place.state_path is None:
        if name is None and place.resume == "auto":  # interrupted before its first checkpoint
            beginning = read_record(place.output).get("beginning")
            if beginning is not None:
                return from_dict(beginning["config"], overrides)
            if (place.output / CONFIG_FILE).exists():
                name = place.output / CONFIG_FILE
            elif "data" not in overrides and any(place.output.glob(WRITING)):
                raise InputError(
                    f"--resume auto: a start was interrupted in {place.output} before its first "
                    "file was complete, and its options are lost; give them again"
                )
        if name is None and overrides.get("data", "digits").partition(":")[0] == "digits":
            name = "digits"
        return resolve(name, overrides)
    before = read_resumable(place.state_path)["config"]
    own = before | (started_with(place.output, before) if place.resume == "auto" else {})
    config = resolve(name, overrides) if name is not None else from_dict(own, overrides)
    may_change = MAY_CHANGE | (REMEDIES & overrides.keys())
    found = difference(config, from_dict(own), may_change)
    if found is not None:
        key, new, old = found
        option = f"--{key.replace('_', '-')} {'none' if new is None else new}"
        change = f"give {option} to change it" if key in REMEDIES else "leave it"
        raise InputError(
            f"{key}: got {new}, but the run to resume has {old}; {change}, or start another run "
            "with another --output"
        )
    return config


def started_with(output: Path, before: dict) -> dict:
    """The keys that the last start in ``output`` changed, and the state's config ``before`` lacks.

    None if the state is of another run, which :func:`check_owner` reports.
    """
    record = read_record(output)
    if record.get("beginning") is not None:
        return record["beginning"]["config"]
    config = record["identity"]["config"] if "identity" in record else before
    if difference(from_dict(before), from_dict(config), MAY_CHANGE | REMEDIES) is not None:
        return {}
    return {key: config[key] for key in ("epochs", *REMEDIES) if key in config}


def train(
    config: RunConfig, place: Place, world: World, signals: Signals, runs: int = 1
) -> None:
    """Train to the last epoch of ``config``, writing only into ``place.output``.

    It is the first of ``runs`` that will take about as long.
    """
    with contextlib.ExitStack() as held:
        run_locked(config, place, world, signals, runs, held)


def run_locked(
    config: RunConfig,
    place: Place,
    world: World,
    signals: Signals,
    runs: int,
    held: contextlib.ExitStack,
) -> None:
    """:func:`train`, with the lock of ``place.output`` in ``held``."""
    output = place.output
    world.on_main(lambda: check_output(place))
    world.on_main(lambda: check_trackers(config))
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    resumed = None if place.state_path is None else read_resumable(place.state_path)
    if resumed is not None:
        world.on_main(lambda: check_owner(place.state_path, resumed, owner_of(place)))
    asked = config
    with obeying(signals, world):
        splits = open_splits(config, None if resumed is None else resumed["class_names"])
        images = world.on_main(lambda: described_images(splits, place, resumed))
        config, changes = config.fitted(len(splits[0].images))
        data = open_data(config, world, splits)
    seed_everything(config.seed)
    args = config.create_args(len(data.split.class_names), data.split.channels)
    model = build_model(config.model, args, config.fused_kernels)
    check_classes(model.num_classes, data.split)
    if config.initial_checkpoint is not None and place.state_path is None:
        begin_from(model, Path(config.initial_checkpoint), data.split.class_names)
    model.to(world.device)
    try_forward(model, config, data.split.channels, world)
    try_batch_norm(model, config, data.split.channels, world)
    speed_up(model, config)
    state, epochs = build_state(model, config, len(data.train), world)
    if resumed is None:
        seed_everything(config.seed + world.rank)
    else:
        restore_checked(state, resumed, config, world, place.state_path, len(data.train))
        check_left(state.epochs_done, epochs, resumed["config"], config)

    owner = identity(asked, data.split.class_names, images)
    about = Weights(
        model=config.model,
        create_args=args,
        class_names=data.split.class_names,
        config=asdict(config) | {"mean": data.mean, "std": data.std},
    )
    best, lost = world.on_main(lambda: claim(place, asked, owner, resumed, about, held))
    world.on_main(lambda: record_start(asked, output, state, owner, world))
    for line in (*opening_lines(config, data, model, epochs, world), *changes):
        world.say(line)
    for reason in place.damaged:
        world.say(f"warning   {reason}: resuming from {place.state_path} instead")
    for line in lost:
        world.say(line)
    if resumed is not None:
        world.say(
            f"resumed   {place.state_path}, after {state.epochs_done} epochs and {state.step} "
            "updates",
        )
        for line in change_lines(resumed["config"], config, is_stream(data.split) and state.step > 0):
            world.say(line)
    keeper = Keeper(output, asked, data.split.class_names, images, world, signals)
    profiler = Profiler(output, config.profile, world)
    steps = len(data.train)
    left = epochs - state.epochs_done
    evaluation = EVALUATION_COST * data.held_out_images / config.batch_size
    updates = left * (steps + evaluation) - state.step
    forecast = Forecast(updates, f"{left} epochs", runs, world)

    def after_step(state: TrainState) -> None:
        forecast.after_step()
        profiler.after_step()
        keeper.after_step(state)

    with Trackers(output, config, state.epochs_done, world) as trackers:
        best = train_epochs(
            state, data, config, epochs, world, about, best, keeper, after_step, trackers
        )
    profiler.close()
    check_end(state, best)
    for line in closing_lines(state.history, best, epochs, output):
        world.say(line)


def check_left(epochs_done: int, epochs: int, before: dict, config: RunConfig) -> None:
    """Refuse to resume a run for fewer epochs than it has done, or with changes but no epoch left."""
    if epochs_done > epochs:
        raise InputError(
            f"epochs: got {epochs}, cool-down included, but the run to resume has done "
            f"{epochs_done}; raise --epochs, or resume an older state with --resume FILE"
        )
    for key in sorted(REMEDIES):
        if epochs_done == epochs and before[key] != getattr(config, key):
            raise InputError(
                f"{key}: got {getattr(config, key)}, but the run to resume has {before[key]} and no "
                "epoch left to train; raise --epochs, or leave it"
            )


def change_lines(before: dict, config: RunConfig, is_amid_stream: bool) -> Iterator[str]:
    """What is other than in the configuration ``before`` of the run to resume."""
    if is_amid_stream and before["workers"] != config.workers:
        yield (
            f"warning   the order of shards depends on --workers, {config.workers} instead of "
            f"{before['workers']}: the rest of this epoch repeats some images and leaves others out"
        )
    for key in sorted(REMEDIES):
        if before[key] != getattr(config, key):
            yield f"{key:<9} {getattr(config, key)} instead of {before[key]}"
    if before["epochs"] != config.epochs:
        yield f"epochs    {config.epochs} instead of {before['epochs']}: another cosine from here"


def check_end(state: TrainState, best: int) -> None:
    """Raise a RunError if the run ends with a model that has diverged; BEST_FILE is of epoch ``best``."""
    remedies = "resume with a lower --lr, with --clip-grad, or with --amp bfloat16 or none"
    if not math.isfinite(state.history[-1]["eval_loss"]):
        kept = f"{BEST_FILE} is from epoch {best}" if best else "no epoch had a finite one"
        raise RunError(
            f"the held-out loss of the last epoch is not finite; {kept}. Lower --lr, set "
            "--clip-grad, or use --amp none in another run"
        )
    if state.diverging:
        raise RunError(
            f"the loss or gradient was not finite in the last {state.skipped_in_a_row} updates, "
            f"which were skipped; the training states from before are kept: {remedies}"
        )


def train_epochs(
    state: TrainState,
    data: Data,
    config: RunConfig,
    epochs: int,
    world: World,
    about: Weights,
    best: int,
    keeper: Keeper,
    after_step: Callable[[TrainState], None],
    trackers: Trackers,
) -> int:
    """Train, evaluate and keep each epoch that is left.

    ``best`` is the epoch whose weights BEST_FILE has, 0 if there are none; so is the result.
    """
    output = keeper.output
    started, drawn, before = time.perf_counter(), time.perf_counter(), state.epochs_done
    is_loader_told = False
    while state.epochs_done < epochs:
        metrics = one_epoch(state, data, config, epochs, world, keeper, after_step)
        state.end_epoch(metrics)
        is_finite = math.isfinite(metrics["eval_loss"])
        if not is_finite:
            world.say(f"warning   the held-out loss of epoch {state.epochs_done} is not finite")
        is_best = is_finite and (not best or metrics["top1"] >= state.history[best - 1]["top1"])
        best = state.epochs_done if is_best else best
        keeper.after_epoch(state)  # first, as the weights of a finished epoch can be read from it
        about = replace(about, epoch=state.epochs_done, top1=metrics["top1"])
        for name in (BEST_FILE, LAST_FILE) if is_best else (LAST_FILE,):
            weights = (state.evaluated_model, output / name, about)
            world.on_main(lambda: save_weights(*weights))
        if world.is_main:
            write_metrics(output / METRICS_FILE, state.history)
            trackers.epoch(metrics)
            if time.perf_counter() - drawn > CURVES_EVERY:
                draw_curves(state.history, output / CURVES_FILE)
                drawn = time.perf_counter()
        done = state.epochs_done
        left = (time.perf_counter() - started) / (done - before) * (epochs - done)
        world.say(epoch_line(metrics, epochs, left) + ("  best" if is_best else ""))
        if not is_loader_told and metrics["loader_images_per_second"]:
            world.say(loader_line(metrics, data.train.num_workers))
            is_loader_told = True
    if world.is_main:
        draw_curves(state.history, output / CURVES_FILE)
    return best


def begin_from(model: nn.Module, path: Path, class_names: list[str]) -> None:
    """Load the weights of ``path``; a head of other classes than ``class_names`` starts afresh."""
    if not path.exists():
        raise InputError(
            f"initial_checkpoint: {path} does not exist; give the weights to start from as --init FILE"
        )
    load_weights(model, path)
    about = read_about(path)
    if about is not None and about.class_names not in (None, class_names):
        model.reset_classifier(model.num_classes)


def one_epoch(
    state: TrainState,
    data: Data,
    config: RunConfig,
    epochs: int,
    world: World,
    keeper: Keeper,
    after_step: Callable[[TrainState], None],
) -> dict:
    """Train and evaluate once; the metrics that METRICS_FILE gets."""
    epoch, started = state.epochs_done + 1, time.perf_counter()
    with Progress(f"epoch {epoch}/{epochs}", len(data.train), world) as progress:
        try:
            metrics = train_epoch(
                state, data, config, world, progress, after_step, lambda: keeper.waiting(state)
            )
        except NonFiniteLoss as error:
            path = keeper.output / NOT_FINITE_FILES.replace("*", str(world.rank))
            write_state(path, error.batch | {"model": state.model.state_dict()})
            text = (
                f"{error}. Each rank's batch is kept with the weights as not_finite-RANK.safetensors"
            )
            raise NonFiniteLoss(text, error.batch) from None
    keeper.before_evaluation(state)
    model = state.evaluated_model
    metrics |= evaluate(model, data.held_out, data.normalize, config, world, keeper)
    return {"epoch": epoch} | metrics | {"seconds": time.perf_counter() - started}


def build_state(
    model: nn.Module, config: RunConfig, updates_per_epoch: int, world: World
) -> tuple[TrainState, int]:
    """The state before the first update, and the number of epochs with the cool-down."""
    optimizer = build_optimizer(model, config)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr * config.lr_factor,
        min_lr=config.min_lr * config.lr_factor,
        cooldown_epochs=config.cooldown_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    ema = None
    if config.ema_decay is not None:
        power = config.ema_warmup_power
        ema = ModelEmaV3(model, config.ema_decay, use_warmup=True, warmup_power=power)
        speed_up(ema.module, config)  # a copy is not compiled
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "float16")
    network = model
    if world.size > 1:
        on_gpu = world.device.type == "cuda"
        network = DistributedDataParallel(
            model,
            device_ids=[world.device] if on_gpu else None,
            gradient_as_bucket_view=True,
        )
    return TrainState(model, network, ema, optimizer, scheduler, scaler), epochs


def restore_checked(
    state: TrainState, resumed: dict, config: RunConfig, world: World, path: Path, steps: int
) -> None:
    """:func:`restore` from the file ``path`` in a run of ``steps`` updates per epoch.

    Raises:
        InputError: the state is not of this model, optimiser and data.
    """
    groups = [dict(group) for group in state.optimizer.param_groups]
    try:
        restore(state, resumed, config, world)
        check_optimizer(state.optimizer, groups)
        if state.step > steps:
            raise ValueError(f"it has done {state.step} of the {steps} updates of an epoch")
    except torch.OutOfMemoryError:
        raise
    # What PyTorch raises for tensors and options that do not fit has no narrower base.
    except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"training state {path} does not fit the run: {reason}") from None


def restore(state: TrainState, resumed: dict, config: RunConfig, world: World) -> None:
    """Put the content of a state file into ``state`` and into this process's generators."""
    state.load_state_dict(resumed["state"])
    ranks = resumed["ranks"]
    if len(ranks) == world.size:
        state.loss_sum, state.images = ranks[world.rank]["loss_sum"], ranks[world.rank]["images"]
        state.unreadable = set(ranks[world.rank]["unreadable"])
        set_rng_state(ranks[world.rank]["rng"], world.device)
        return
    if world.is_main:
        state.loss_sum = sum(rank["loss_sum"] for rank in ranks)
        state.images = sum(rank["images"] for rank in ranks)
    state.unreadable = {problem for rank in ranks for problem in rank["unreadable"]}
    world.say(
        f"the run had {len(ranks)} processes and now has {world.size}: random numbers "
        "start afresh, so it will not end bit-identical to an uninterrupted one",
    )
    seed_everything(config.seed + world.rank + 1000 * state.epochs_done)


def check_output(place: Place) -> None:
    """Refuse an output folder that holds anything but the run to resume."""
    output = place.output
    try:
        if not output.exists() or all(path.match(WRITING) for path in output.iterdir()):
            return
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror}; choose another folder") from None
    if place.resume is None:
        raise InputError(
            f"--output {output} is not empty; resume its run with --resume auto, or choose "
            "another --output"
        )
    record = read_record(output)
    if place.moves:
        beginning = record.get("beginning")
        is_known = beginning is not None and beginning["state"] is not None
        is_known = is_known and Path(beginning["state"]).parent == place.state_path.parent.resolve()
    else:
        is_known = place.state_path is not None or record
    if not is_known:
        own = " (to resume the run there, give --resume auto)" if record else ""
        raise InputError(
            f"--output {output} is not empty and does not hold the run to resume; choose another "
            f"--output{own}"
        )


def claim(
    place: Place,
    config: RunConfig,
    owner: dict,
    resumed: dict | None,
    about: Weights,
    held: contextlib.ExitStack,
) -> tuple[int, list[str]]:
    """Make and lock the output folder, and fit what it holds to the state to resume.

    Until the start is complete, RUN_FILE says how to repeat it. Returns the epoch whose weights are
    in BEST_FILE, 0 if there are none, and lines on what was set aside.
    """
    output = place.output
    if place.moves:  # read before anything is written
        copied = fitting(place.state_path, resumed, about, moves=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror}; choose another folder") from None
    held.enter_context(locked(output))
    check_output(place)  # another run may have begun there since
    if listing(output) != place.before:
        raise InputError(f"--output {output}: another run has just written there; start again")
    for leftover in output.glob(WRITING):  # of a run that was killed
        leftover.unlink()
    if place.state_path is None or place.moves:
        source = place.state_path.parent.resolve() / place.state_path.name if place.moves else None
        state = None if source is None else str(source)
        beginning = {"state": state, "config": asdict(config)}
        record = {"starts": []} | read_record(output)
        record |= {"beginning": beginning, "identity": owner}
        write_atomically(output / RUN_FILE, json.dumps(record, indent=2) + "\n")
    if resumed is None:
        return 0, []
    state = output / state_name(resumed["state"]["epochs_done"], resumed["state"]["step"])
    if place.moves:
        replace_files(output, copied.files)
    if place.state_path.resolve() != state.resolve():
        write_state(state, resumed)  # under the name by which --resume auto finds it
    fits = fitting(state, resumed, about)
    lines = [*(copied if place.moves else fits).lines]
    lines += rewind(output, resumed["state"], fits.strange)
    replace_files(output, fits.files)
    remove_oldest(output, config.keep_checkpoints)
    return fits.best, lines


def replace_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files by their names."""
    for name, content in contents.items():
        write_atomically(folder / name, content)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the folder for this process; file systems that lock no folders go without.

    Raises:
        InputError: another process holds it.
    """
    folder = os.open(output, os.O_RDONLY)
    try:
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"--output {output}: another run is writing there; choose another folder"
                    ) from None
                time.sleep(0.2)
            except OSError:  # not supported, as for folders over NFS
                break
        yield
    finally:
        os.close(folder)


def record_start(
    config: RunConfig, output: Path, state: TrainState, owner: dict, world: World
) -> None:
    """Write the configuration, the circumstances, and the metrics of the epochs done."""
    write_atomically(output / CONFIG_FILE, config.to_yaml())
    path = output / RUN_FILE
    record = read_record(output)
    if not record and os.path.lexists(path):
        aside = set_aside(path)
        world.say(f"warning   {path} is not the record of a run; renamed to {aside.name}")
    start = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "epochs_done": state.epochs_done,
        "step": state.step,
        "world_size": world.size,
        "device": describe_device(world.device),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    record = {
        "class_names": owner["class_names"],
        "identity": owner,
        "starts": [*record.get("starts", []), start],
    }
    write_metrics(output / METRICS_FILE, state.history)
    # Last, as it marks the start as complete.
    write_atomically(path, json.dumps(record, indent=2) + "\n")


def read_record(output: Path) -> dict:
    """What RUN_FILE says: ``starts``, ``identity`` (see :func:`identity`; missing in the earlier
    format), and ``beginning`` until the first start is complete.

    Empty if the file is missing, damaged or another program's.
    """
    try:
        record = json.loads(read_text(output / RUN_FILE))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(record, dict) or not isinstance(record.get("starts"), list):
        return {}
    beginning = record.get("beginning")
    if beginning is not None and not (
        isinstance(beginning, dict)
        and isinstance(beginning.get("state", 0), str | None)
        and isinstance(beginning.get("config"), dict)
    ):
        return {}
    if "identity" in record and not is_identity(record["identity"]):
        return {}
    return record


def owner_of(place: Place) -> dict | None:
    """The :func:`identity` that the folder of the state to resume has, if any."""
    return read_record(place.state_path.parent).get("identity")


def described_images(
    splits: tuple[Split, Split], place: Place, resumed: dict | None
) -> dict[str, dict]:
    """:func:`described` images; an InputError if they are not those of the run to resume."""
    images = described(splits)
    if resumed is not None:
        before = resumed.get("images") or (owner_of(place) or {}).get("images")
        check_data(splits[0].class_names, images, place.state_path, resumed, before)
    return images


def write_metrics(path: Path, history: list[dict]) -> None:
    """One JSON object per line and epoch; null for what is not finite, which JSON cannot say."""
    rows = (
        {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        for metrics in history
    )
    write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
