"""The trainer: the state of a run and the methods that change it."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from t2tvit.charts import draw_curves
from t2tvit.errors import InputError, NonFiniteLoss, OneRankError, RunError
from t2tvit.terminal import printable
from t2tvit.training.checkpointing import Checkpointer
from t2tvit.training.checkpointing.file_names import BEST_FILE, CURVES_FILE, METRICS_FILE
from t2tvit.training.checkpointing.run_folder import write_metrics
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World
from t2tvit.training.evaluation import CHECK_EVERY, evaluate
from t2tvit.training.log import closing_lines, epoch_line, loader_line
from t2tvit.training.model import speed_up
from t2tvit.training.optimizer import build_optimizer, build_scheduler, check_optimizer
from t2tvit.training.pipeline import Data, batches, begin_epoch
from t2tvit.training.profiling import Profiler
from t2tvit.training.progress import Forecast, LoaderClock, Progress, peak_memory
from t2tvit.training.randomness import rng_state, seed_everything, set_rng_state
from t2tvit.training.samples import SampleBatch
from t2tvit.training.trackers import Trackers

CURVES_EVERY = 60  # seconds
EVALUATION_COST = 1 / 3  # of the cost of an update, per image: only the forward pass
# Errors that PyTorch raises for a state whose tensors or options do not fit; no narrower base exists.
MISFITS = (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError)


class Trainer:
    """Owns the model, optimiser, data and progress of a run; a context manager that closes it.

    All ranks have the same values, except for ``loss_sum``, ``images`` and ``unreadable``.

    Args:
        config: The run's configuration, fitted to its data.
        world: The processes of the run.
        data: This rank's share of the images.
        model: The model, on this rank's device and ready to train.
        checkpointer: Writes to the run's folder. Required by :meth:`fit`, but not by
            :meth:`train_epoch` and :meth:`evaluate`.

    Attributes:
        epochs: Epochs of the whole run, cool-down included.
        updates: Updates so far. The learning rate depends on this number alone.
        epochs_done: Completed epochs.
        step: Completed batches of the current epoch.
        loss_sum: Sum of the losses of this rank's ``images`` in the current epoch.
        unreadable: Why images of this rank could not be read, one message per image.
        skipped: Skipped updates of the current epoch.
        skipped_in_a_row: Skipped updates since the last one that was not skipped.
        diverging: Whether the last update was skipped, and not only because the loss scale was too
            large.
        best: The epoch of the weights in BEST_FILE; 0 if there is none.
        history: The metrics of each completed epoch.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        data: Data,
        model: nn.Module,
        checkpointer: Checkpointer | None = None,
    ):
        self.config, self.world, self.data, self.model = config, world, data, model
        self.checkpointer = checkpointer
        self.optimizer = build_optimizer(model, config)
        self.scheduler, self.epochs = build_scheduler(self.optimizer, config, len(data.train))
        self.ema = None
        if config.ema_decay is not None:
            power = config.ema_warmup_power
            self.ema = ModelEmaV3(model, config.ema_decay, use_warmup=True, warmup_power=power)
            speed_up(self.ema.module, config)  # a copy is not compiled
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "float16")
        self.network = model  # wrapped if there are several ranks
        if world.size > 1:
            self.network = DistributedDataParallel(
                model,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
        if not config.mixes:
            self.mix, self.loss_function = None, LabelSmoothingCrossEntropy(config.smoothing)
        else:
            self.loss_function = SoftTargetCrossEntropy()
            self.mix = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                switch_prob=config.mixup_switch,
                label_smoothing=config.smoothing,
                num_classes=model.num_classes,
            )
        self.trackers: Trackers | None = None
        self.profiler: Profiler | None = None
        self.forecast: Forecast | None = None
        self.updates = self.epochs_done = self.step = self.images = self.best = 0
        self.skipped = self.skipped_in_a_row = 0
        self.loss_sum: Tensor | float = 0.0
        self.diverging = False
        self.unreadable: set[str] = set()
        self.history: list[dict] = []

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.close(failed=kind is not None)

    @property
    def evaluated_model(self) -> nn.Module:
        """The model with averaged weights, or the trained model if there is no average."""
        return self.model if self.ema is None else self.ema.module

    @property
    def own_checkpointer(self) -> Checkpointer:
        """The checkpointer, which :meth:`fit` cannot do without."""
        if self.checkpointer is None:
            raise ValueError("checkpointer: got None, but Trainer.fit writes to a run's folder")
        return self.checkpointer

    # Run

    def fit(self, runs: int = 1) -> None:
        """Train, evaluate and save each remaining epoch.

        Args:
            runs: The number of runs of similar length, including this one; the log estimates their time.

        Raises:
            Stopped: A signal asked the run to stop.
            NonFiniteLoss, OneRankError: See :meth:`train_epoch`.
        """
        config, output = self.config, self.own_checkpointer.output
        epochs_left = self.epochs - self.epochs_done
        evaluation = EVALUATION_COST * self.data.held_out_images / config.batch_size
        updates = epochs_left * (len(self.data.train) + evaluation) - self.step
        self.profiler = Profiler(output, config.profile, self.world)
        self.forecast = Forecast(updates, f"{epochs_left} epochs", runs, self.world)
        self.trackers = Trackers(output, config, self.epochs_done, self.world)
        started, drawn, before = time.perf_counter(), time.perf_counter(), self.epochs_done
        is_loader_told = False
        while self.epochs_done < self.epochs:
            metrics = self.one_epoch()
            is_best = self._end_epoch(metrics)
            if self.world.is_main:
                write_metrics(output / METRICS_FILE, self.history)
                self.trackers.epoch(metrics)
                if time.perf_counter() - drawn > CURVES_EVERY:
                    draw_curves(self.history, output / CURVES_FILE)
                    drawn = time.perf_counter()
            done = self.epochs_done
            seconds = (time.perf_counter() - started) / (done - before) * (self.epochs - done)
            line = epoch_line(metrics, self.epochs, seconds)
            self.world.say(line + ("  best" if is_best else ""))
            if not is_loader_told and metrics["loader_images_per_second"]:
                self.world.say(loader_line(metrics, self.data.train.num_workers))
                is_loader_told = True
        if self.world.is_main:
            draw_curves(self.history, output / CURVES_FILE)

    def close(self, failed: bool = False) -> None:
        """Close the trackers and the profiler; ``failed`` says whether an error ended the run."""
        with contextlib.ExitStack() as components:  # closes each, even if another one fails
            for component in (self.trackers, self.profiler):
                if component is not None:
                    components.callback(component.close, failed)

    def report(self) -> None:
        """Log the results of the finished run.

        Raises:
            RunError: The model has diverged.
        """
        remedies = "resume with a lower --lr, with --clip-grad, or with --amp bfloat16 or none"
        if not math.isfinite(self.history[-1]["eval_loss"]):
            best = f"{BEST_FILE} is from epoch {self.best}"
            kept = best if self.best else "no epoch had a finite one"
            raise RunError(
                f"the held-out loss of the last epoch is not finite; {kept}. Lower --lr, set "
                "--clip-grad, or use --amp none in another run"
            )
        if self.diverging:
            raise RunError(
                f"the loss or gradient was not finite in the last {self.skipped_in_a_row} updates, "
                f"which were skipped; the earlier training states are kept: {remedies}"
            )
        for line in closing_lines(
            self.history, self.best, self.epochs, self.own_checkpointer.output
        ):
            self.world.say(line)

    # Epoch

    def one_epoch(self) -> dict:
        """Train and evaluate for one epoch; returns its row of METRICS_FILE."""
        epoch, started = self.epochs_done + 1, time.perf_counter()
        try:
            metrics = self.train_epoch()
        except NonFiniteLoss as error:
            self.own_checkpointer.keep_batch(self, error.batch)
            text = f"{error}. Each rank's batch is kept with the weights as not_finite-RANK.safetensors"
            raise NonFiniteLoss(text, error.batch) from None
        self.own_checkpointer.before_evaluation(self)
        metrics |= self.evaluate()
        return {"epoch": epoch} | metrics | {"seconds": time.perf_counter() - started}

    def train_epoch(self) -> dict[str, float]:
        """Train from ``step`` to the end of the epoch.

        Returns:
            ``train_loss`` and ``images_per_second`` over all ranks; ``loader_images_per_second``,
            the throughput that the loader processes could reach; ``loader_wait``, the share of time
            that training waited for them; ``memory_mib``, the peak memory of rank 0 so far; ``lr`` of
            the last update; ``skipped_updates``, the number of updates whose loss or gradient was not
            finite; and ``unreadable_images``, the number found so far.

        Raises:
            NonFiniteLoss: More than ``max_skipped`` updates in a row were skipped.
            OneRankError: Too many images cannot be read.
            Stopped: A signal asked the run to stop; its state is saved.
        """
        steps = len(self.data.train)
        begin_epoch(self.data.train, self.epochs_done, self.step)
        self.network.train()
        self.loss_sum = torch.as_tensor(
            self.loss_sum, dtype=torch.float64, device=self.world.device
        )
        clock = LoaderClock(self.images)
        title = f"epoch {self.epochs_done + 1}/{self.epochs}"
        with Progress(title, steps, self.world) as progress:
            samples = (SampleBatch(*each) for each in self._awaited(batches(self.data.train)))
            for batch in clock.timed(samples):
                self._note_unreadable(batch.problem)
                self.learn(*self._inputs(batch), batch.name)
                if self.step % CHECK_EVERY == 0 or self.step == steps:
                    progress.show(self.step, self._progress_line(clock))
                self._after_step()
        return self._epoch_metrics(clock)

    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on the held-out images; see :func:`.evaluation.evaluate`."""
        data, model = self.data, self.evaluated_model
        return evaluate(
            model, data.held_out, data.normalize, self.config, self.world, self.checkpointer
        )

    def _end_epoch(self, metrics: dict) -> bool:
        """Save the completed epoch; returns whether it is the best so far."""
        self.epochs_done += 1
        self.step, self.loss_sum, self.images, self.skipped = 0, 0.0, 0, 0
        self.history.append(metrics)
        is_finite = math.isfinite(metrics["eval_loss"])
        if not is_finite:
            self.world.say(f"warning   the held-out loss of epoch {self.epochs_done} is not finite")
        best = self.history[self.best - 1]["top1"] if self.best else -math.inf
        is_best = is_finite and metrics["top1"] >= best
        self.best = self.epochs_done if is_best else self.best
        # The state first: if the process is killed in between, the weights can be restored from it.
        self.own_checkpointer.after_epoch(self)
        self.own_checkpointer.keep_weights(self, is_best)
        return is_best

    def _awaited(self, items: Iterator) -> Iterator:
        """``items``. A signal interrupts the wait for an item, and profiles show the wait by name."""
        while True:
            waiting = contextlib.nullcontext()
            if self.checkpointer is not None:
                waiting = self.checkpointer.waiting(self)
            with record_function("wait for the loader"), waiting:
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    @record_function("augment")
    def _inputs(self, batch: SampleBatch) -> tuple[Tensor, Tensor]:
        """The augmented images and the targets of a batch, on this rank's device."""
        images = self.data.augment(batch.image)
        targets = batch.label.to(self.world.device, non_blocking=True)
        return (images, targets) if self.mix is None else self.mix(images, targets)

    def _note_unreadable(self, problems: list[str]) -> None:
        """Log each image that could not be read, once.

        Raises:
            OneRankError: This rank has found more than ``max_unreadable``.
        """
        for problem in filter(None, problems):
            if problem in self.unreadable:
                continue
            self.unreadable.add(problem)
            if len(self.unreadable) > self.config.max_unreadable:
                raise OneRankError(
                    f"{len(self.unreadable)} training images cannot be read, the last: {problem}; "
                    "or raise --max-unreadable"
                )
            line = f"warning   process {self.world.rank}: {problem}; the next image replaces it"
            print(printable(line), flush=True)

    def _after_step(self) -> None:
        for component in (self.forecast, self.profiler):
            if component is not None:
                component.after_step()
        if self.checkpointer is not None:
            self.checkpointer.after_step(self)

    def _progress_line(self, clock: LoaderClock) -> str:
        """Loss, throughput and memory of the current epoch so far."""
        rate = (self.images - clock.images_before) * self.world.size / clock.seconds
        mean = float(self.loss_sum) / max(self.images, 1)
        wait = clock.waited / clock.seconds
        memory = peak_memory(self.world.device)
        return f"loss {mean:.3f}, {rate:,.0f} images/s, loader {wait:.0%}, {memory:,.0f} MiB"

    def _epoch_metrics(self, clock: LoaderClock) -> dict[str, float]:
        """The result of :meth:`train_epoch`."""
        world, seconds = self.world, clock.seconds
        own = [float(self.loss_sum), self.images, clock.images_before, clock.waited, clock.reading]
        sums = world.sum(torch.tensor(own, dtype=torch.float64, device=world.device))
        loss_sum, images, before, waited, reading = sums.tolist()
        readers = max(self.data.train.num_workers, 1) * world.size
        return {
            "train_loss": loss_sum / images,
            "images_per_second": (images - before) / seconds,
            "loader_images_per_second": readers * (images - before) / max(reading, 1e-9),
            "loader_wait": waited / world.size / seconds,
            "memory_mib": peak_memory(world.device),
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "skipped_updates": self.skipped,
            "unreadable_images": len(set().union(*world.gather(self.unreadable))),
        }

    # Update

    def learn(self, images: Tensor, targets: Tensor, names: Tensor | list[str]) -> None:
        """Update the weights, or skip the update if its loss or gradient is not finite.

        Args:
            images: (B, C, H, W), float32.
            targets: Classes (B,), or probabilities (B, classes).
            names: Names of the images, for messages.

        Raises:
            NonFiniteLoss: Too many updates have been skipped.
        """
        self.scheduler.step_update(self.updates)
        generators = rng_state(self.world.device)
        buffers = [(value, value.clone()) for value in self.model.buffers()]
        loss = self.accumulate(images, targets)
        if self.update():
            self.skipped_in_a_row, self.diverging = 0, False
            self.loss_sum = self.loss_sum + loss * len(images)
            self.images += len(images)
        else:
            for value, before_update in buffers:  # such as the statistics of batch norm
                value.copy_(before_update)
            names = names.tolist() if isinstance(names, Tensor) else names
            batch = {"images": images, "targets": targets, "rng": generators, "names": names}
            self._report_skipped(loss.item(), batch)
        self.updates += 1
        self.step += 1

    def accumulate(self, images: Tensor, targets: Tensor) -> Tensor:
        """Compute the gradients of the mean loss in ``config.accumulate`` pieces of the batch.

        Returns:
            The mean loss of this rank's images. The gradients are averaged over all ranks.
        """
        self.optimizer.zero_grad()
        count, device = self.config.accumulate, self.world.device
        pieces = list(zip(images.tensor_split(count), targets.tensor_split(count), strict=True))
        total = torch.zeros((), device=device)
        for number, (part, wanted) in enumerate(pieces, start=1):
            # The ranks exchange gradients once, after the last piece.
            alone = self.world.size > 1 and number < len(pieces)
            with self.network.no_sync() if alone else contextlib.nullcontext():
                try:
                    with record_function("forward"), self.config.autocast(device):
                        loss = self.loss_function(self.network(part), wanted)
                        loss = loss * (len(part) / len(images))
                except InputError:
                    raise
                except ValueError as error:  # PyTorch and timm raise it for shapes
                    raise InputError(
                        f"model {self.config.model} does not train on {len(part)} images of "
                        f"{tuple(part.shape[1:])}: {error}; change --batch-size, --accumulate or "
                        "--model"
                    ) from None
                with record_function("backward"):
                    # Makes the gradients of every rank non-finite if the loss of one rank is.
                    self.scaler.scale(loss * (1 + 0 * loss.detach())).backward()
            total += loss.detach()
        return total

    @record_function("optimiser")
    def update(self) -> bool:
        """Step the optimiser and update the average, unless a gradient is not finite.

        Returns:
            Whether the optimiser made a step; the same on every rank.
        """
        self.scaler.unscale_(self.optimizer)
        parameters = [value for value in self.model.parameters() if value.grad is not None]
        norm = nn.utils.get_total_norm([value.grad for value in parameters])
        if self.config.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad, norm)
        is_finite = bool(norm.isfinite())
        if is_finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if is_finite and self.ema is not None:
            self.ema.update(self.model, step=self.updates + 1)
        return is_finite

    def _report_skipped(self, loss: float, batch: dict) -> None:
        """Count a skipped update and log the ranks and images of its ``batch``.

        Raises:
            NonFiniteLoss: Too many updates have been skipped.
        """
        self.skipped += 1
        self.skipped_in_a_row += 1
        where = f"step {self.step + 1} of epoch {self.epochs_done + 1}"
        ranks = self.world.gather((loss, batch["names"]))
        bad = {rank: entry for rank, entry in enumerate(ranks) if not math.isfinite(entry[0])}
        # With a finite loss and a scaler, only the loss scale was too large.
        self.diverging = bool(bad) or not self.scaler.is_enabled()
        what = "the loss is not finite" if bad else "the gradient is not finite"
        whose = "; ".join(
            f"rank {rank}: loss {value}, training images {' '.join(map(str, names))}"
            for rank, (value, names) in (bad or dict(enumerate(ranks))).items()
        )
        is_whole_epoch = self.skipped == len(self.data.train)
        if self.skipped_in_a_row > self.config.max_skipped or is_whole_epoch:
            kept = "; the last checkpoint is intact" if self.epochs_done > 0 else ""
            raise NonFiniteLoss(
                f"{what} at {where}, {self.skipped_in_a_row} times in a row ({whose}){kept}. "
                "Lower --lr, set --clip-grad, or use --amp bfloat16 or none",
                batch,
            )
        if self.diverging:
            self.world.say(f"warning   {what} at {where} ({whose}); update skipped")

    # State

    def state_dict(self) -> dict:
        """The state that all ranks share. A state file also has the state of each rank."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "updates": self.updates,
            "epochs_done": self.epochs_done,
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "history": self.history,
        }

    def load_state_dict(self, state: dict) -> None:
        """Load a :meth:`state_dict`, possibly read from a file."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        # JSON turned the indices of the parameters into text.
        moments = {int(number): each for number, each in state["optimizer"]["state"].items()}
        self.optimizer.load_state_dict(state["optimizer"] | {"state": moments})
        if state["scaler"]:  # empty if the loss was not scaled
            self.scaler.load_state_dict(state["scaler"])
        self.updates, self.epochs_done = state["updates"], state["epochs_done"]
        self.step, self.history = state["step"], state["history"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]

    def restore(self, content: dict, path: Path) -> None:
        """Load the ``content`` of the state file ``path``, including random generators.

        Raises:
            InputError: The state does not fit the model, optimiser or data.
        """
        groups = [dict(group) for group in self.optimizer.param_groups]
        steps = len(self.data.train)
        try:
            self.load_state_dict(content["state"])
            self._restore_ranks(content["ranks"])
            check_optimizer(self.optimizer, groups)
            if self.step > steps:
                raise ValueError(f"it is at update {self.step}, an epoch has {steps}")
        except torch.OutOfMemoryError:
            raise
        except MISFITS as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"training state {path} does not fit the run: {reason}") from None

    def _restore_ranks(self, ranks: list[dict]) -> None:
        """Restore the state of each rank.

        If the number of ranks has changed, rank 0 gets the sums and every generator is reseeded.
        """
        world = self.world
        if len(ranks) == world.size:
            own = ranks[world.rank]
            self.loss_sum, self.images = own["loss_sum"], own["images"]
            self.unreadable = set(own["unreadable"])
            set_rng_state(own["rng"], world.device)
            return
        if world.is_main:
            self.loss_sum = sum(rank["loss_sum"] for rank in ranks)
            self.images = sum(rank["images"] for rank in ranks)
        self.unreadable = {problem for rank in ranks for problem in rank["unreadable"]}
        world.say(
            f"the run had {len(ranks)} processes and now has {world.size}: random generators "
            "are reseeded, so the result will differ from that of an uninterrupted run"
        )
        seed_everything(self.config.seed + world.rank + 1000 * self.epochs_done)
