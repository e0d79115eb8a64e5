"""The loop: step, validate, save, resume."""

import time
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from diffkd.assembly import assemble, check_outputs
from diffkd.batch import Batch
from diffkd.errors import NotFiniteError, UserError
from diffkd.maths.randomness import random_state, seed_everything, set_random_state
from diffkd.models.measure import peak_memory, reset_peak_memory
from diffkd.pictures.loading import Loader
from diffkd.recipe.schema import Recipe, dump
from diffkd.recipe.sides import Side
from diffkd.runs.bar import ProgressBar
from diffkd.runs.console import Reporter
from diffkd.runs.folder import RunFolder, load_checkpoint, resume_hint
from diffkd.runs.places import check_folder, check_identity
from diffkd.tasks.base import Figures
from diffkd.training.balance import Balance
from diffkd.training.checkpoint import lasting, load_optimizer_state, not_finite, optimizer_state, unwrapped
from diffkd.training.devices import as_channels_last, expect_unused, fuses, gathered, on_first, own_code
from diffkd.training.dryrun import try_step
from diffkd.training.early import Choice, ended, is_asked, is_late, watching
from diffkd.training.ema import Ema
from diffkd.training.ending import describe_student, summary_of, write_best
from diffkd.training.evaluation import Look, Witness, evaluate
from diffkd.training.interrupt import InterruptedRunError, StopRequest
from diffkd.training.length import Length
from diffkd.training.loggers import Loggers, check_loggers
from diffkd.training.meter import Meter, Place
from diffkd.training.optim import build_optimizer, lr_factor, set_lr
from diffkd.training.teacher import teacher_figures, untrained


class Trainer:
    """One run from a recipe to a run folder.

    Args:
        recipe: the run.
        fabric: launched.
        reporter: says what happens.

    Raises:
        UserError: the recipe cannot be run; nothing is written.
    """

    witness: Witness | None = None  # of the last evaluation on the test data

    def __init__(self, recipe: Recipe, fabric: Fabric, reporter: Reporter) -> None:
        self.recipe, self.fabric, self.reporter = recipe, fabric, reporter
        check_loggers(recipe.trainer.loggers)
        self.folder = RunFolder(recipe.run_folder())
        on_first(fabric, lambda: check_folder(self.folder, recipe))
        seed_everything(recipe.seed)
        self.parts = parts = assemble(recipe, with_teacher=bool(recipe.method))
        self._heard: list[str] = []  # in another process than the first, which does not speak
        parts.say = reporter.warn if fabric.is_global_zero else self._heard.append
        on_first(fabric, lambda: check_identity(self.folder, parts.identity, reporter.warn))
        sample = parts.sample(2)
        self.agreement = sample.targets is None
        check_outputs(parts, sample)
        self.ema = None
        if recipe.trainer.ema is not None:
            self.ema = Ema(parts.student.model, recipe.trainer.ema)
            self.ema.model.to(fabric.device)
        self.distiller, self.warnings = parts.distiller(sample)
        torch.backends.cudnn.benchmark = isinstance(sample.images, Tensor)  # pictures of one size
        self._set_up()

    def _set_up(self) -> None:
        recipe, fabric, parts = self.recipe, self.fabric, self.parts
        where: dict[str, Any] = {
            "device": fabric.device,
            "rank": fabric.global_rank,
            "world_size": fabric.world_size,
        }
        self.train_loader = parts.loader(parts.training, shuffle=True, **where)
        self.test_loader = parts.loader(parts.data.test, shuffle=False, **where)
        val, task = parts.data.val, parts.task
        self.val_loader = None if val is None else parts.loader(val, shuffle=False, **where)
        sign = 1 if task.higher_is_better else -1
        key, on = (task.metric, "test") if val is None else (f"val_{task.metric}", "val")
        self.choice = Choice(key, sign, on)
        steps = len(self.train_loader) // recipe.trainer.accumulate
        if steps == 0:
            raise UserError(
                f"trainer.accumulate={recipe.trainer.accumulate} is more than the "
                f"{len(self.train_loader)} batches of an epoch"
            )
        self.length = Length.of(recipe.trainer, steps)
        self.batches_per_epoch = steps * recipe.trainer.accumulate
        step = parts.step(self.distiller)
        alone = recipe.data.batch_size == fabric.world_size  # one picture a device
        if silent := try_step(step, parts.sample(1 if alone else 2), parts.student.name):
            self.warnings.append(expect_unused(fabric, silent))
        if recipe.trainer.channels_last:
            held = (self.ema, *parts.teachers.values())
            as_channels_last(step, *(each.model for each in held if each is not None))
        if recipe.trainer.compile:
            # A model runs with the taps' hooks in training and without them else: two graphs.
            torch._dynamo.config.skip_nnmodule_hook_guards = False
            models = (side.model for side in (parts.student, *parts.teachers.values()))
            for module in (*models, *self.distiller.methods.values()):
                module.compile()
        for side in parts.teachers.values():
            side.to(fabric.device)
        self.distiller.expect(self.length.total * recipe.trainer.accumulate)
        self.balance = Balance(self.distiller, recipe, fabric, steps)
        self.plain = step
        optimizer = build_optimizer(recipe.optimizer, step, fused=fuses(fabric, recipe.trainer))
        self.step, self.optimizer = fabric.setup(step, optimizer)
        # What a model holds on purpose (a mask of minus infinities, say) says nothing of training.
        self._never_finite = set(not_finite(lasting(step)))

    @property
    def shipped(self) -> Side:
        """The student that is evaluated and shipped: the averaged one where there is EMA."""
        student = self.parts.student
        return student if self.ema is None else Side(student.name, self.ema.model, student.prepare)

    # --- the run ---------------------------------------------------------------------------------

    def run(self) -> RunFolder:
        """Trains to the end, from the newest checkpoint if the recipe says resume."""
        if self.folder.finished:
            self.reporter.note(f"the run in {self.folder.path} is finished")
            return self.folder
        # What only the end needs is tried before the beginning.
        with own_code("a model, while its cost is measured,"):
            self.costs = self._measure() if self.fabric.is_global_zero else {}
        # From here on every process draws its own noise.
        seed_everything(self.recipe.seed, self.fabric.global_rank)
        reset_peak_memory(self.fabric.device)
        teachers = self._judge_teachers()
        place = self._begin()
        self.meter, self.since = Meter(place.sums), time.perf_counter()
        self.clock = self.since
        with StopRequest() as stop, self.reporter.bar(self.length.last, place.step) as bar:
            while place.step < self.length.last and not place.ended:
                self._train_epoch(place, bar, stop)
        if place.ended:
            self.reporter.note(f"ended after {self.length.told(place.step)}: {place.ended}")
        self._finish(place, teachers)
        self.fabric.barrier()  # nobody reads the student before it is written
        return self.folder

    def _measure(self) -> dict[str, dict[str, float]]:
        sides = {"student": self.parts.student, **self.parts.teachers}
        return {what: self.parts.cost(side).as_dict() for what, side in sides.items()}

    def _begin(self) -> Place:
        """Makes the folder, or finds the place where the run stopped."""
        place = Place()
        if self.fabric.is_global_zero:
            fresh = not self.folder.exists()
            if fresh:
                self.folder.create(dump(self.recipe))
            if fresh or not self.folder.knows_identity:
                self.folder.write_identity(self.parts.identity)
            self.reporter.log = self.folder.say
            for line in (f"run folder: {self.folder.path}", *self.parts.account(self.distiller)):
                self.reporter.note(line)
            for line in self.warnings:
                self.reporter.warn(line)
        self.fabric.barrier()
        found = self.folder.newest_checkpoint(self.reporter.warn) if self.fabric.is_global_zero else None
        found = self.fabric.broadcast(found)
        if found is not None:
            place = self._load(found)
            self.reporter.note(f"resumed at epoch {place.epoch + 1}, step {place.step} from {found.name}")
            if self.fabric.is_global_zero:  # rows that a killed run did not come to write
                self.folder.write_history(place.history)
        if self.fabric.is_global_zero:
            self.loggers = Loggers(self.folder, self.recipe, self.reporter)
        return place

    def _judge_teachers(self) -> dict[str, dict[str, float]]:
        """The teachers' own figures by name; warns where one looks untrained."""
        parts = self.parts
        found: dict[str, dict[str, float]] = {name: {} for name in parts.teachers}
        for name, teacher in parts.teachers.items() if parts.teacher_answers else ():
            figures = teacher_figures(parts, name, self.fabric, partial(self._judge, teacher))
            for line in untrained(parts, name, figures):
                self.reporter.warn(line)
            found[name] = figures
        return found

    def _train_epoch(self, place: Place, bar: ProgressBar, stop: StopRequest) -> None:
        """The rest of the epoch that the place is in, or of the run."""
        epoch = place.epoch
        self.step.train()
        for batch in self.train_loader.epoch(epoch, place.batch):
            updates = (place.batch + 1) % self.recipe.trainer.accumulate == 0
            self.meter.add(self._step(batch, place, updates), place.step + 1)
            place.advance(self.batches_per_epoch, updates)
            bar.step(updates, len(batch.images) * self.fabric.world_size, self.length.told(place.step))
            if updates:
                self._after_update(place, bar, stop)
            if place.epoch != epoch or place.step >= self.length.last or place.ended:
                return

    def _after_update(self, place: Place, bar: ProgressBar, stop: StopRequest) -> None:
        """What is due after an optimizer step: a look, an evaluation, a checkpoint, an end."""
        trainer, now = self.recipe.trainer, time.perf_counter()
        place.seconds += now - self.since
        self.since = now
        if place.step % trainer.log_every == 0:
            self._look(place, bar)
        self._tick(place)
        late = is_late(trainer, place, self.length, self.fabric)
        row = self.length.evaluates(place.step) or late
        stopping = is_asked(stop, trainer, place, self.fabric)
        if row:
            self._add_row(place, bar, late)
        elif stopping or (trainer.save_every is not None and place.step % trainer.save_every == 0):
            self._save(place)
        if stopping:
            self._stop(place, stop)
        if row:
            self.step.train()
            self.since = time.perf_counter()

    def _step(self, batch: Batch, place: Place, updates: bool) -> dict[str, Tensor]:
        """One batch forward and backward, and the update where one is due."""
        trainer, optimizer = self.recipe.trainer, self.optimizer
        self.lr = self.recipe.learning_rate * lr_factor(self.recipe.schedule, place.step, self.length)
        set_lr(optimizer, self.lr)
        self.distiller.at(self.length.progress(place.step))
        with self.fabric.no_backward_sync(self.step, enabled=not updates):
            with own_code(f"training step {place.step + 1}"):
                losses = self.balance(self.step(batch), place.step)
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
            self.fabric.backward(total / trainer.accumulate)
        if updates:
            if trainer.clip_grad_norm is not None:
                self.fabric.clip_gradients(
                    self.step, optimizer, max_norm=trainer.clip_grad_norm, error_if_nonfinite=False
                )
            optimizer.step()
            optimizer.zero_grad()
            if self.ema is not None:
                self.ema.update(self.parts.student.model, place.step + 1)
        return {"loss": total, **losses, **self.distiller.figures}

    def _look(self, place: Place, bar: ProgressBar) -> None:
        """Reads the losses: the only time that the host waits for the device between evaluations."""
        self._check_losses()
        last = self.meter.last()
        losses = {name: value for name, value in last.items() if name not in self.distiller.figures}
        bar.show(self.length.told(place.step), losses)
        if self.fabric.is_global_zero:
            self.loggers.log({f"step/{k}": v for k, v in last.items()}, place.step)

    def _check_losses(self) -> None:
        self.parts.task.check_seen()
        if (bad := self.meter.first_not_finite(self._all_reduce)) is not None:
            self._not_finite(f"loss '{bad[0]}' is not finite at step {bad[1]}")

    def _check_weights(self, place: Place) -> None:
        """A checkpoint of weights that are nan would poison every run that goes on from it."""
        bad = [n for n in not_finite(lasting(self.plain)) if n not in self._never_finite]
        bad += not_finite((f"average of {n}", v) for n, v in lasting(self.ema.model)) if self.ema else []
        if bad:
            name = bad[0].removeprefix("distiller.")
            self._not_finite(f"'{name}' is not finite after step {place.step}, though the losses were")

    def _not_finite(self, what: str) -> None:
        saved = [path.name for path in self.folder.list_checkpoints()[-1:]]
        kept = f"the last good checkpoint is {saved[0]}" if saved else "no checkpoint was saved yet"
        raise NotFiniteError(
            f"{what}; {kept}; try a lower optimizer.lr, trainer.clip_grad_norm=1 or trainer.precision=fp32"
        )

    def _tick(self, place: Place) -> None:
        """Counts the time since the last tick."""
        now = time.perf_counter()
        place.elapsed += now - self.clock
        self.clock = now

    def _add_row(self, place: Place, bar: ProgressBar, late: bool) -> None:
        """Evaluates, writes a row of history, saves."""
        self._check_losses()
        self._check_weights(place)
        also = self.witness(self.parts) if self.witness and (late or place.step >= self.length.last) else None
        figures = self._validate(self.test_loader, bar, "testing", also)
        held = {} if self.val_loader is None else self._validate(self.val_loader, bar, "validating").scalars
        place.scalars, place.arrays = list(figures.scalars), dict(figures.arrays)
        images = self.meter.count * self.train_loader.batch_size
        row = {
            "epoch": self.length.told_epochs(place.step),
            "step": place.step,
            "lr": self.lr,
            **self.meter.means(self._all_reduce),
            **figures.scalars,
            **{f"val_{name}": value for name, value in held.items()},
            "seconds": round(place.seconds, 3),
            "images_per_second": round(images / max(place.seconds, 1e-9), 1),
            "memory_mb": round(peak_memory(self.fabric.device) / 2**20, 1),
        }
        place.add_row(row)
        self._tick(place)
        place.ended = ended(self.recipe.trainer, self.choice, place, late)
        self.meter = Meter({})
        self._save(place)
        for line in chain.from_iterable(gathered(self.fabric, self._heard)):
            self.reporter.warn(line)
        self._heard.clear()
        if self.fabric.is_global_zero:
            self.folder.append_history(place.history)
            self.loggers.log({f"epoch/{k}": v for k, v in row.items()}, place.step)
            self.reporter.row(row, self.choice.told(place.history, self.length, self.parts.task))

    def _validate(self, loader: Loader, bar: ProgressBar, what: str, also: Look | None = None) -> Figures:
        if self.fabric.world_size > 1:
            for buffer in self.shipped.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        return self._evaluate(self.shipped, loader, watching(bar, loader, what, also))

    def _judge(self, teacher: Side) -> Figures:
        loader = self.test_loader
        with self.reporter.bar(len(loader), what="teacher's figures") as bar:
            return self._evaluate(teacher, loader, watching(bar, loader))

    def _evaluate(self, side: Side, loader: Loader, show: Look) -> Figures:
        task, teacher = self.parts.task, self.parts.teacher
        return evaluate(side, task, loader, teacher, show, precision=self.recipe.trainer.precision)

    # --- saving ----------------------------------------------------------------------------------

    def _stop(self, place: Place, stop: StopRequest) -> None:
        assert stop.signal is not None
        line = (
            f"stopped at epoch {place.epoch + 1}, step {place.step}; saved; {resume_hint(self.folder.path)}"
        )
        self.reporter.record(line)
        raise InterruptedRunError(line, stop.signal)

    def _save(self, place: Place) -> None:
        self._check_losses()
        self._check_weights(place)
        place.sums = self.meter.sums(self._all_reduce)
        random = gathered(self.fabric, random_state(self.fabric.device))
        if self.fabric.is_global_zero:
            state = {
                "model": self.plain.state_dict(),
                "optimizer": optimizer_state(unwrapped(self.optimizer), self.plain),
                "precision": self.fabric.strategy.precision.state_dict(),
                "ema": None if self.ema is None else self.ema.state_dict(),
                "random": random,
                "place": place.state(),
            }
            best = self.choice.best(place.history)
            keep = [int(best["step"])] if best else []
            self.folder.save_checkpoint(place.step, lambda path: torch.save(state, path), keep)
        self.fabric.barrier()

    def _load(self, path: Path) -> Place:
        state = load_checkpoint(path)
        self.plain.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if state["optimizer"] is None:  # of a finished run: only its end is to be written
            return Place.of(state["place"], self.batches_per_epoch)
        load_optimizer_state(unwrapped(self.optimizer), self.plain, state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        if len(state["random"]) == self.fabric.world_size:
            set_random_state(state["random"][self.fabric.global_rank], self.fabric.device)
        else:
            self.reporter.warn("resumed with another number of processes: the noise is drawn anew")
        return Place.of(state["place"], self.batches_per_epoch)

    def _all_reduce(self, value: Tensor, how: str) -> Tensor:
        reduced = self.fabric.all_reduce(value, reduce_op=how)
        assert isinstance(reduced, Tensor)
        return reduced

    # --- the end ---------------------------------------------------------------------------------

    def _finish(self, place: Place, teachers: dict[str, dict[str, float]]) -> None:
        """Writes the student and the summary."""
        if not self.fabric.is_global_zero:
            return
        self.loggers.end()
        best = self.choice.best(place.history)
        assert best is not None
        figures = {name: place.history[-1][name] for name in place.scalars}
        self.folder.write_student(self.shipped.model.state_dict(), describe_student(self.parts, figures))
        write_best(self, place, best)
        self.folder.write_summary(summary_of(self, place, best, figures, teachers))
