"""The training loop: schedule, evaluation, samples, events, checkpoints and resume. It knows no backend, no text and no
recipe.

    training = Training(FromScratchOptions(steps=500), out="runs/first")
    for event in training.run():
        ...                       # RunStart, Step, Evaluation, Sample, RunEnd: draw them, print them, or do nothing

Everything random is a function of (seed, step), so a run that was stopped and resumed is the run that was not stopped.
"""

import contextlib
import dataclasses
import functools
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, cast

import numpy as np

from toy import switch
from toy.config import VERSION, ModelConfig
from toy.data import Corpus, Split, load_corpus
from toy.data.tokenizers import Tokenizer
from toy.engines.shared import check_shares
from toy.files import BadFileError, Checkpoint, Run, read_events
from toy.files.atomic import StrPath
from toy.files.events import Evaluation, Event, EventLog, Notice, RunEnd, RunStart, Sample, Step
from toy.files.runs import check_new_folder
from toy.models.base import Model
from toy.training.estimate import Estimate, in_bytes, in_time, measure, steps_in
from toy.training.high_loss import HighLoss
from toy.training.options import RunOptions, TextOptions, saved_options
from toy.training.ranks import MPIRanks, one_device_each
from toy.training.start import Decision, Start, TextStart, without_path
from toy.training.table import RECIPES
from toy.training.together import lead


class DivergedError(RuntimeError):
    """The loss, a gradient or a weight is no longer a finite number."""


class _Resumed(NamedTuple):
    """What `Training.resume` or `Training.branch` found.

    unchanged: names of the options that the run takes from before. options: the run's own. branch: whether another run
    begins with the checkpoint. notices: sentences about the run directory. left_out: why newer checkpoints than this one are
    not gone on from, "" without any. drawing: whether only the pictures of a run that is done are wanted.
    """

    run: Run
    checkpoint: Checkpoint | None
    unchanged: Set[str]
    options: RunOptions
    branch: bool = False
    notices: Sequence[str] = ()
    left_out: str = ""
    drawing: bool = False


class Training:
    """A run that is ready to go. Making it reads and checks everything, writes nothing, and changes nothing in the process.

    options: the options of a recipe (`FromScratchOptions`, `LoRAOptions`, ...). out: the run directory to make (None:
    nothing is written, the events are all there is). progress: called with (bytes done, bytes in all) while a long text is
    encoded. resumed: what `Training.resume` passes on. ranks: on rank 0 of several processes that share every batch, all of
    them (`toy.training.ranks.join`); the others call `toy.training.together.follow`. Raises ValueError (CorpusError, ...) for
    anything that cannot be trained on, BackendUnavailableError for a backend that is not there.

    Attributes: options, start (what the run begins with: data, tokenizer, recipe), config (of the model), recipe, schedule,
    step (updates done), stopped_by (the signal that ended `run`, None without one), best (the lowest validation loss after a
    step and that step, None before there is one), out_of_patience (whether `run` ended because of it).
    """

    def __init__(
        self,
        options: RunOptions,
        out: StrPath | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        resumed: _Resumed | None = None,
        ranks: MPIRanks | None = None,
    ) -> None:
        if ranks is not None:
            check_shares(options.batch, ranks.size)
        if out is not None and resumed is None:
            check_new_folder(out)
        self.out = None if out is None else Path(out)
        default = next(field.default for field in dataclasses.fields(options) if field.name == "steps")
        if resumed is None and options.budget is not None and options.steps != default:
            raise ValueError(f"steps and {options.budget} each say how long to train: give one of them")
        self._budget = f"{options.budget} {getattr(options, options.budget):g}" if options.budget is not None else ""
        asked, options = options, options.resolved()
        self.ranks = ranks
        self._own_threads, self._why_threads = (
            (options.threads, "") if ranks is None else ranks.threads(options.threads)
        )
        device = one_device_each(options.device, ranks)
        self.start = start = RECIPES[options.recipe](dataclasses.replace(options, device=device))
        self.recipe = start.recipe
        start.progress = progress
        try:
            start.read()
            if start.options.budget in ("epochs", "tokens"):
                start.options = start.options.with_steps(_steps_of(start), asked)
            self.config = start.config
            with switch.use_num_threads(self._own_threads):
                if ranks is None:
                    start.realize()
                else:
                    again = "" if out is None else f"The run goes on from its last checkpoint with --resume {out}."
                    lead(ranks, start, options.device, cast(int, self._own_threads), again)
        except MemoryError as error:
            raise ValueError(f"there is not enough memory for a run of this size ({error})") from error
        self.estimate: Estimate | None = None
        if start.options.budget == "minutes":
            done = resumed.checkpoint.step if resumed is not None and resumed.checkpoint is not None else 0
            with switch.use_num_threads(self._own_threads):
                steps = done + steps_in(start, 60 * cast(float, start.options.minutes), asked)
            start.options = start.options.with_steps(steps, asked)
        self.options = options = start.options
        self.schedule = options.make_schedule()
        numbers = {name: getattr(options, name) for name in ("lr", "weight_decay", "beta1", "beta2", "eps")}
        self._adamw = self.recipe.adamw(**{name: value for name, value in numbers.items() if value is not None})
        self._adamw.hp_for_step(0)  # numbers out of range are told now
        self.step = 0
        self.stopped_by: int | None = None
        self._loss: float | None = None  # of the last step
        self._log: EventLog | None = None
        self._evaluated: set[int] = set()  # the steps that have it already
        self._sampled: set[int] = set()
        self._saved: int | None = None  # the step of the newest checkpoint
        self.best: tuple[float, int] | None = None
        self.out_of_patience = False
        self._worse = 0  # validations since the best one
        self._branched_from: dict[str, Any] | None = None
        self._notices: list[str] = []
        self._run: Run | None = None
        self._pictures: dict[str, Path] = {}  # what `_draw` drew, and where
        self._unchanged: Set[str] = frozenset()
        self._left_out = ""
        self._high = HighLoss(self.recipe.n_classes)
        if resumed is not None:
            self._go_on(resumed)

    @classmethod
    def resume(
        cls,
        folder: StrPath,
        recipe: str | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        from_step: int | None = None,
        ranks: MPIRanks | None = None,
        **changes: Any,
    ) -> "Training":
        """The run in `folder` (a path), ready to go on from its newest checkpoint: weights, moments and step.

        from_step: of the checkpoint to go on from when the newer ones are damaged; they are deleted when the run begins.
        recipe: the name of the one it must be of, None: any.
        changes: options by name. Those that are marked as resumable may differ: steps (the total, more than are done), corpus
        and model (a new place of the same text, of the same file), what does not change the numbers, and backend, device and
        threads, which round a little differently.
        Raises BadFileError for a damaged run, ValueError for a change that is not possible.
        """
        run, options, as_it_ran = _open_run(folder, recipe, changes, "--resume goes on with it", ranks)
        resumable = {field.name for field in dataclasses.fields(options) if field.metadata.get("resumable")}
        for name, value in changes.items():
            value = getattr(dataclasses.replace(options, **{name: value}), name)  # as the options themselves spell it
            if name not in resumable and value != getattr(options, name):
                raise ValueError(
                    f"the run in {folder} was begun with {name} {getattr(options, name)} and cannot go on with {value}: "
                    "leave the option out, or let a new run begin with its checkpoint (--resume RUN --branch)"
                )
        checkpoint: Checkpoint | None
        if from_step is None:
            checkpoint, left_out = run.read_checkpoint(), ""
        else:
            _, checkpoint, left_out = run.read_step(from_step)
        notices = [] if checkpoint is None else _compare_config(run, checkpoint, options, changes)
        done = checkpoint.step if checkpoint else 0
        if run.events_path.exists():
            read_events(run.events_path, reach=done)  # damage is told now, not when the log is gone on with
        elif done:
            notices.append(f"{run.events_path} is gone: the curve begins at step {done}")
        unchanged = as_it_ran.keys() - changes.keys()
        resumed = _Resumed(run, checkpoint, unchanged, options, notices=notices, left_out=left_out)
        changed = dataclasses.replace(options, **{**as_it_ran, **changes})
        if changed.budget is None:
            if done == changed.steps and _has_ended(run):
                drawn = _draw_again(cls, changed, resumed._replace(drawing=True))
                raise ValueError(f"the run in {folder} has done its {done} steps: give it more steps to go on{drawn}")
            _check_steps(resumed, changed.steps)
        return cls(changed, run.folder, progress=progress, resumed=resumed, ranks=ranks)

    @classmethod
    def branch(
        cls,
        folder: StrPath,
        out: StrPath | None = None,
        recipe: str | None = None,
        *,
        checkpoint: str | int = "last",
        progress: Callable[[int, int], None] | None = None,
        ranks: MPIRanks | None = None,
        **changes: Any,
    ) -> "Training":
        """A new run in `out` that begins with a checkpoint of the run in `folder`: its weights, moments and step, with other
        options where `changes` has them. The old run stays as it is, and the new one's config.json names it.

        checkpoint: "last", "best" or a step. steps counts from the beginning of the old run, and so does the schedule.
        Raises ValueError for changes that make another model or another vocabulary, otherwise as `resume`.
        """
        run, options, as_it_ran = _open_run(folder, recipe, changes, "makes a branch of it", ranks)
        found = run.read_checkpoint(checkpoint)
        if found is None:
            raise ValueError(f"the run in {folder} has no checkpoint yet, so nothing can begin with it")
        resumed = _Resumed(run, found, as_it_ran.keys() - changes.keys(), options, branch=True)
        changed = dataclasses.replace(options, **{**as_it_ran, **changes})
        if changed.budget is None:
            _check_steps(resumed, changed.steps)
        if out is not None:
            check_new_folder(out)
        return cls(changed, out, progress=progress, resumed=resumed, ranks=ranks)

    def _go_on(self, resumed: _Resumed) -> None:
        run, checkpoint, self._unchanged, before, branch = resumed[:5]
        self._notices.extend(resumed.notices)
        self._left_out = resumed.left_out
        if branch:
            self._check_same_model(run)
            self._branched_from = {"run": str(run.folder.absolute()), "step": cast(Checkpoint, checkpoint).step}
        else:
            self.start.check_same(run)
            if run.config.get("model") != _json_of(self.config):
                raise BadFileError(run.config_path, "its model or tokenizer does not fit its training options")
            self._run = run
        if not resumed.drawing:
            _check_steps(resumed, self.options.steps)
        self._tell_rate(before, checkpoint.step if checkpoint else 0)
        if checkpoint is not None:
            try:
                self.recipe.load_parameters(checkpoint.parameters)
                self.recipe.load_optimizer_state(checkpoint.moments)
            except ValueError as error:
                raise BadFileError(run.latest_checkpoint() or run.folder, str(error)) from error
            self.step = checkpoint.step
            self._saved = None if branch else checkpoint.step

    def _check_same_model(self, run: Run) -> None:
        """Raise ValueError unless the checkpoints of `run` are of the model and the vocabulary that this one trains."""
        now = {**self.start.describe(), "model": _json_of(self.config)}
        for name in ("model", "tokenizer", "base", "lora", "lens", "classes"):
            if without_path(run.config.get(name)) != without_path(now.get(name)):
                raise ValueError(
                    f"the {name} of the run in {run.folder} is another one, and a branch goes on with its weights: "
                    "leave out the options that change it, or start a new run"
                )

    def _tell_rate(self, before: RunOptions, step: int) -> None:
        """Note a learning rate that goes on elsewhere than the run's own schedule would have gone on."""
        if not 0 < step < self.options.steps:
            return
        was, now = before.make_schedule()(step - 1), self.schedule(step)
        expected = before.make_schedule()(min(step, before.steps - 1))
        if not math.isclose(now, expected, rel_tol=1e-3):
            self._notices.append(
                f"the learning rate was {was:.2e} at step {step} and goes on with {now:.2e}: its schedule is now "
                f"{self.options.schedule} over {self.options.steps:,} steps (before: {before.schedule} over {before.steps:,})"
            )

    # -- what the run is ----------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """Of a run on text."""
        return cast(TextStart, self.start).tokenizer

    @property
    def data(self) -> Any:
        """What the batches are drawn from: a `toy.data.training_data.TextData`, or `toy.data.images.Images`."""
        return self.start.data

    @property
    def corpus(self) -> Corpus:
        """Of a run on text: the whole `Corpus`, read again."""
        return load_corpus(cast(TextOptions, self.options).corpus)

    @property
    def split(self) -> Split:
        """Of a run on text: the ids to train on and to validate, in the order in which they are read."""
        return Split(self.data.training.tokens(), self.data.validation.tokens())

    def notices(self) -> Sequence[str]:
        """Sentences about the data, the schedule and the directory of a run that goes on, that a user should know."""
        return [*self.start.notices(), *self._notices]

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint on the disk to go on from."""
        return self._run is not None and self._run.latest_checkpoint() is not None

    def written(self) -> list[tuple[str, Path]]:
        """(what, path) of everything a reader of the run may want, of what is there."""
        out = self.out
        if out is None:
            return []
        files = {"picture": out / "loss.png", "confusion": out / "confusion.png"} | self._pictures
        files |= {"samples": out / "samples.txt", "weights": out / "weights"}
        return [(what, path) for what, path in files.items() if path.exists()]

    def model(self) -> Model:
        """A readable model object with a copy of the present weights."""
        return self.recipe.model_copy()

    def choices(self) -> list[Decision]:
        """What was chosen and why, as a list of `Decision`."""
        o, r, s = self.options, self.recipe, self.start
        before = dict.fromkeys(self._unchanged, "as before")
        threads = self._why_threads or ("as asked for" if o.threads else "the backend's own choice")
        trained = "" if r.n_trained == r.n_parameters else f"{r.n_trained:,} of them are trained"
        decay = "" if o.schedule == "constant" else f" down to {o.lr * o.lr_floor:g} at step {o.steps}"
        rounds, classes = o.steps / s.steps_per_epoch, r.n_classes
        passes = "" if o.accumulate == 1 else f", in {o.accumulate} passes"
        again = f"{r.recompute} of {r.config.n_layers} blocks"
        budget = f"{self._budget}; " if self._budget else ""
        takes = []
        if self.estimate is not None:
            e = self.estimate
            memory = "" if e.bytes is None else f"; memory about {in_bytes(e.bytes)}"
            takes = [
                Decision("takes", f"about {in_time(e.seconds)}", f"{in_time(e.step_seconds)} a step, measured{memory}")
            ]
        return [
            *([Decision("resumed", f"after step {self.step}", self._left_out)] if self._run is not None else []),
            *([Decision("branched", f"after step {b['step']} of {b['run']}")] if (b := self._branched_from) else []),
            Decision("backend", r.backend, before.get("backend", r.backend_reason)),
            Decision("device", r.device),
            *(
                []
                if self.ranks is None
                else [Decision("ranks", f"{self.ranks.size}, which share each batch", self.ranks.words())]
            ),
            Decision("threads", str(self._threads() or "unknown"), before.get("threads", threads)),
            *s.decisions(),
            Decision("parameters", f"{r.n_parameters:,}", trained),
            *(
                []
                if o.precision == "f32"
                else [Decision("precision", o.precision, f"products of linear layers, by {switch.bf16_products()}")]
            ),
            *([Decision("recompute", again, before.get("recompute", r.recompute_reason))] if r.recompute else []),
            Decision(
                "steps",
                f"{o.steps:,} of {s.per_step:,} {s.unit}s{passes}",
                f"{budget}{rounds:.2g} times the training part",
            ),
            Decision("learning rate", f"{o.lr:g}", f"{o.schedule}{decay}, {o.warmup} steps of warm-up"),
            Decision("ln(V)", f"{math.log(classes):.3f}", f"nats per {s.unit}, the loss of a uniform guess"),
            *takes,
            Decision("directory", "none, nothing is written" if self.out is None else str(self.out)),
        ]

    def _threads(self) -> int | None:
        used = next(row.threads for row in switch.backends() if row.name == self.recipe.backend)
        return self._own_threads or used

    def measure(self) -> Estimate:
        """How long the run will take and how much memory, by trying: a few steps that change nothing, a validation, a few
        tokens of a sample -> `Estimate`, also kept in `estimate`. Weights, moments and everything random stay as they are."""
        with switch.use_num_threads(self._own_threads):
            self.estimate = measure(self.start, self.step, writes=self.out is not None)
        return self.estimate

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self, on_stop: Callable[[], None] | None = None) -> Generator[Event, None, None]:
        """Train, as a generator of events; the same events go to events.jsonl.

        Ctrl-C, SIGTERM or SIGHUP (the terminal was closed) ends it after the step that is being computed, with a checkpoint
        and RunEnd("interrupted"); so does leaving the loop. on_stop() is then called from the signal handler, at once. A
        second Ctrl-C raises KeyboardInterrupt without a checkpoint. Call `run` again to go on.
        Raises DivergedError when a number is no longer finite (the last checkpoint stays), and when the loss at the end is
        far above that of a uniform guess (see `toy.training.high_loss`); OSError when a file cannot be written.
        """
        resumed = self._run is not None
        with contextlib.ExitStack() as stack:
            self._log = self._open_files(stack)
            stack.enter_context(switch.use_num_threads(self._own_threads))
            stop = stack.enter_context(_StopSignals(on_stop, at_once=self.ranks is None))
            try:
                if self._branched_from is not None and self._saved is None:
                    self._save()  # what the branch begins with is a part of it
                yield self._emit(self._run_start(resumed))
                yield from self._steps(stop)
                self._save()
                if self.step == self.options.steps and self._high.lasts:
                    raise self._diverged(self._high.words())
            except GeneratorExit:
                self._save()
                self._emit(self._run_end("interrupted"))
                raise
            except DivergedError:
                yield self._emit(self._run_end("diverged"))
                self._draw()
                raise
            self.stopped_by = stop.requested
            completed = "completed" if self.step == self.options.steps else "interrupted"
            end = self._emit(self._run_end("patience" if self.out_of_patience else completed))
            self._draw()
            yield end

    def _steps(self, stop: "_StopSignals") -> Iterator[Event]:
        """Train up to the last step. What is due after a step is done before the next one, by a resumed run if need be; the
        checkpoint first, so that a process killed in a long validation loses nothing."""
        o, samples_every = self.options, getattr(self.options, "sample_every", None)
        while self.step == o.steps or not stop.requested:
            if self.step > 0 and (self.step == o.steps or (o.save_every and self.step % o.save_every == 0)):
                self._save()
            if self._due(o.eval_every, self._evaluated):
                event = self._evaluate()
                self._emit(event)
                self._remember(event)
                yield event
            if self._due(samples_every, self._sampled) and self.step > 0:
                yield self._emit(self._sample())
            if self.step < o.steps and o.patience is not None and self._worse >= o.patience:
                self.out_of_patience = True
                return
            if self.step == o.steps:
                return
            if not stop.requested:
                step = self._train_step()
                if self.ranks is not None and self.ranks.stopped_by:
                    stop.requested = self.ranks.stopped_by
                yield self._emit(step)
                if self._high.see(step.loss):
                    yield self._emit(Notice(step=self.step, text=self._high.words()))

    def _train_step(self) -> Step:
        k, lr = self.step, self.schedule(self.step)
        started = time.perf_counter()
        inputs, labels = self.start.training_batch(k)
        hp = self._adamw.hp_for_step(k, lr=lr)
        with np.errstate(all="ignore"):  # the next lines say it in words
            loss = float(self.recipe.step(inputs, labels=labels, hp=hp, is_first=k == 0))
        wall_us = round((time.perf_counter() - started) * 1e6)
        grad_norm = float(self.recipe.grad_norm)
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                raise self._diverged(f"the {name} became {value} at step {k + 1}")
        self.step, self._loss = k + 1, loss
        return Step(
            step=k + 1, loss=loss, lr=lr, grad_norm=grad_norm, tokens=self.start.per_step, wall_us=max(1, wall_us)
        )

    def _evaluate(self) -> Evaluation:
        with np.errstate(all="ignore"):
            found = self.start.validate()
        if not math.isfinite(found["loss"]):
            raise self._diverged(f"the validation loss became {found['loss']} at step {self.step}")
        self._evaluated.add(self.step)
        return Evaluation(step=self.step, **found)

    def _remember(self, event: Evaluation) -> None:
        """Count a validation, and keep the checkpoint of the best one. The weights at step 0 are no result of the run."""
        if event.step == 0:
            return
        if self.best is not None and event.loss >= self.best[0]:
            self._worse += 1
            return
        self.best, self._worse = (event.loss, event.step), 0
        if self._run is not None:
            self._save()
            self._run.mark_best(event.step, self.options.keep)

    def _remember_all(self, kept: list[dict[str, Any]]) -> None:
        """The same for the validations of a run that goes on, whose checkpoints may be gone."""
        run = cast(Run, self._run)
        self.best, self._worse = None, 0
        losses = [(event["loss"], event["step"]) for event in kept if event["kind"] == "eval" and event["step"] > 0]
        for loss, step in losses:
            if self.best is None or loss < self.best[0]:
                self.best, self._worse = (loss, step), 0
            else:
                self._worse += 1
        there = [(loss, step) for loss, step in losses if run.has_checkpoint(step)]
        if there:
            run.mark_best(min(there)[1], self.options.keep)

    def _sample(self) -> Sample:
        text = self.start.sample(self.step) or ""
        self._sampled.add(self.step)
        if self._run is not None:
            self._run.append_sample(self.step, text)
        return Sample(step=self.step, text=text)

    def _due(self, every: int | None, done: set[int]) -> bool:
        if not every or self.step in done:
            return False
        return self.step % every == 0 or self.step == self.options.steps

    def _diverged(self, what: str) -> DivergedError:
        clip = f"a clip below {self.options.clip:g}" if self.options.clip else "a clip, of 1 say"
        return DivergedError(f"{what}: the training diverged; try an lr below {self.options.lr:g} or {clip}")

    # -- files --------------------------------------------------------------------------------------------------------

    def _open_files(self, stack: contextlib.ExitStack) -> EventLog | None:
        """The event log (None when nothing is written), with the run directory made or rewound to this step."""
        if self.out is None:
            return None
        if self._run is None:
            self._run = stack.enter_context(Run.begin(self.out, self._describe()))
        else:
            stack.enter_context(self._run.lock())
            kept = self._run.rewind(self.step)
            self._evaluated = {event["step"] for event in kept if event["kind"] == "eval"}
            self._sampled = {event["step"] for event in kept if event["kind"] == "sample"}
            self._remember_all(kept)
            self._high = HighLoss(self.recipe.n_classes, (event["loss"] for event in kept if event["kind"] == "step"))
            self._run.config.update(self._describe())
            self._run.write_config()
        log = EventLog(self._run.events_path)
        stack.callback(log.close)
        return log

    def _emit(self, event: Event) -> Event:
        if self._log is not None:
            self._log.write(event)
        return event

    def _save(self) -> None:
        if self._run is None or self._saved == self.step:
            return
        parameters, moments = self.recipe.parameters(), self.recipe.optimizer_state()
        for what, arrays in (("weight", parameters), ("moment", moments["m"]), ("moment", moments["v"])):
            for name, array in arrays.items():
                if not np.isfinite(array).all():
                    raise self._diverged(f"a {what} of {name} is not a finite number at step {self.step}")
        if self._log is not None:
            self._log.sync()  # the events first: a checkpoint must never know more than the log
        gguf = None
        if self.start.has_gguf():
            gguf = functools.partial(self.start.write_gguf, parameters=parameters)
        checkpoint = Checkpoint(self.step, self._run.config, parameters, moments)
        self._run.write_checkpoint(checkpoint, self.options.keep, gguf)
        self._saved = self.step

    def _draw(self) -> None:
        if self._run is not None and self.step > 0:
            from toy.plots import plot_runs

            self._pictures["picture"] = plot_runs([self._run.folder], self._run.picture_path)
            self._pictures |= self.start.draw(self._run.folder)

    def _run_start(self, resumed: bool) -> RunStart:
        return RunStart(
            step=self.step,
            steps=self.options.steps,
            arch=self.recipe.arch,
            n_parameters=self.recipe.n_parameters,
            vocab_size=self.recipe.n_classes,
            backend=self.recipe.backend,
            device=self.recipe.device,
            seed=self.options.seed,
            bytes_per_token=self.start.bytes_per_token,
            resumed=resumed,
        )

    def _run_end(self, reason: str) -> RunEnd:
        loss = None if reason == "diverged" else self._loss
        return RunEnd(reason=reason, final_step=self.step, final_loss=loss)

    def _describe(self) -> dict[str, Any]:
        """What config.json and every checkpoint say about the run."""
        return {
            "recipe": self.options.recipe,
            "arch": self.recipe.arch,
            "model": _json_of(self.config),
            "training": _json_of(self.options),
            **self.start.describe(),
            "n_parameters": self.recipe.n_parameters,
            "backend": {
                "name": self.recipe.backend,
                "device": self.recipe.device,
                "threads": self._threads(),
                **({} if self.ranks is None else {"ranks": self.ranks.size}),
            },
            "versions": versions(),
            **({} if self._branched_from is None else {"branched_from": self._branched_from}),
        }


def _open_run(
    folder: StrPath, recipe: str | None, changes: Mapping[str, Any], what_to_do: str, ranks: MPIRanks | None
) -> tuple[Run, RunOptions, dict[str, Any]]:
    """The run in `folder`, and its options as `_read_config` gives them, without the threads where they were those of another
    number of ranks. what_to_do: with `toy train RECIPE`, for a run of
    another recipe than `recipe`. Raises ValueError for such a run, and for changes that say twice how long to train."""
    run = Run.open(folder)
    options, as_it_ran = _read_config(run)
    if run.config["backend"].get("ranks", 1) != (1 if ranks is None else ranks.size):
        del as_it_ran["threads"]
    if recipe not in (None, options.recipe):
        raise ValueError(f"the run in {folder} is of another kind: toy train {options.recipe} {what_to_do}")
    given = [name for name in ("steps", *options.budgets) if changes.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} each say how long to train: give one of them")
    return run, options, as_it_ran


def _check_steps(resumed: _Resumed, steps: int) -> None:
    """Raise ValueError unless a run can go on, or branch, to this many steps in all."""
    folder, before = resumed.run.folder, resumed.options.steps
    done = resumed.checkpoint.step if resumed.checkpoint else 0
    if steps < before and not resumed.branch:
        raise ValueError(f"the run in {folder} was begun with {before} steps, it cannot go on to only {steps}")
    if done > steps or (done == steps and (resumed.branch or _has_ended(resumed.run))):
        raise ValueError(f"the run in {folder} has done its {done} steps: give it more steps to go on")


def _has_ended(run: Run) -> bool:
    """Whether the run has written its end: one that was killed in its last validation has not."""
    if not run.events_path.exists():
        return False
    ends = [event for event in read_events(run.events_path) if event["kind"] in ("run_start", "run_end")]
    return bool(ends) and ends[-1]["kind"] == "run_end" and ends[-1]["reason"] == "completed"


def _steps_of(start: Start) -> int:
    """The steps that a budget of epochs or tokens asks for."""
    o = start.options
    epochs = o.epochs if o.epochs is not None else cast(TextOptions, o).tokens / start.n_train  # type: ignore[operator]
    return max(1, math.ceil(epochs * start.steps_per_epoch - 1e-9))


def versions() -> dict[str, str]:
    """dict of the versions that a run's numbers may depend on."""
    return {
        "toy": VERSION,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
    }


def _read_config(run: Run) -> tuple[RunOptions, dict[str, Any]]:
    """The options in a config.json, and the backend, device and threads it really ran on (they round alike)."""
    try:
        kind = RECIPES[run.config.get("recipe", "from-scratch")].options_class
        options, ran = kind(**saved_options(kind, run.config["training"])), run.config["backend"]
        return options, {"backend": ran["name"], "device": ran["device"], "threads": ran["threads"]}
    except (KeyError, TypeError, ValueError) as error:
        raise BadFileError(run.config_path, f"its training options are wrong ({error})") from error


def _compare_config(run: Run, checkpoint: Checkpoint, options: RunOptions, changes: Mapping[str, Any]) -> list[str]:
    """Raise BadFileError when config.json has other options than the checkpoint, which is protected, was trained with.

    Those that a run may go on with may differ (it may have been killed before its next checkpoint): sentences about them.
    """
    then, _ = _read_config(Run(run.folder, checkpoint.config))
    notices = []
    for field in dataclasses.fields(options):
        name, now, was = field.name, getattr(options, field.name), getattr(then, field.name, None)
        if now == was or name in changes:
            continue
        if not field.metadata.get("resumable"):
            raise BadFileError(
                run.config_path,
                f"its {name} is {now}, and the checkpoint of step {checkpoint.step} was trained with {was}: put it back, or "
                "start a new run",
            )
        notices.append(f"config.json says {name} {now}, when step {checkpoint.step} was saved it was {was}")
    return notices


def _draw_again(kind: type[Training], options: RunOptions, resumed: _Resumed) -> str:
    """Draw the pictures of a run that is done, which was perhaps killed while it drew. Returns a piece of a sentence."""
    start = RECIPES[options.recipe]
    with resumed.run.lock():
        resumed.run.remove_leftovers()
    if start.draw is Start.draw:  # no data are needed
        from toy.plots import plot_runs

        return f"; its picture was drawn again: {plot_runs([resumed.run.folder], resumed.run.picture_path)}"
    kind(options, resumed.run.folder, resumed=resumed)._draw()
    return "; its pictures were drawn again"


def _json_of(record: RunOptions | ModelConfig) -> dict[str, Any]:
    """A dataclass as JSON would give it back: lists for tuples."""
    items = dataclasses.asdict(record).items()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items}


# of them Windows has no SIGHUP
_STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class _StopSignals:
    """While open, Ctrl-C, SIGTERM and SIGHUP ask for a stop (`requested`) instead of breaking into a half-done update.

    A second Ctrl-C raises KeyboardInterrupt, with at_once. Only the main thread gets signals, elsewhere this does nothing.
    """

    def __init__(self, on_stop: Callable[[], None] | None, at_once: bool = True) -> None:
        self.requested: int | None = None  # the number of the signal
        self._at_once = at_once
        self._on_stop = on_stop
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup and the like are to be respected
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT and self._at_once:
            raise KeyboardInterrupt
        told, self.requested = self.requested is not None, number
        if self._on_stop is not None and (self._at_once or not told):  # a launcher may pass one signal on twice
            self._on_stop()
