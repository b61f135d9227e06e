"""What the command line shows while it works: choices at the start, the progress of a training, text fit for a terminal."""

import shutil
import sys
import textwrap
import time
import unicodedata

import click


def show_choices(choices):
    """The automatic choices and their reasons, one a line."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    for name, value, reason in choices:
        text = f"{value} ({reason})" if reason else value
        lines = textwrap.wrap(text, max(20, width - 15), break_on_hyphens=False, break_long_words=False)
        click.echo(f"{name:<15}" + ("\n" + " " * 15).join(lines))


class EncodingBar:
    """Called with (bytes done, bytes in all) while a text is encoded: a line on a terminal's stderr, now and then."""

    def __init__(self):
        self.started = self.last = time.monotonic()

    def __call__(self, done, total):
        now = time.monotonic()
        if not sys.stderr.isatty() or (now - self.last < 0.2 and done < total) or now - self.started < 1:
            return
        self.last = now
        left = (now - self.started) * (total - done) / max(done, 1)
        share = f"{100 * done / max(total, 1):.0f} % of {total / 1e6:,.0f} MB, {clock(left)} left"
        text = f"encoding {share}" if done < total else ""
        click.echo(f"\r{text}\033[K", nl=False, err=True)


class Progress:
    """Shows the events of a run: a live line in a terminal, otherwise a line per validation or at least every 10 seconds."""

    def __init__(self, steps, first_step, unit="token"):
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self.steps, self.first_step, self.unit = steps, first_step, unit
        self.step, self.validation, self.accuracy = first_step, None, None
        self.losses, self.rates = Recent(), Recent()  # of the last steps: one step's loss jumps with its batch
        self.started = self.last_line = time.monotonic()
        self.console = Console(highlight=False)
        self.bar = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            step, numbers = TextColumn("step {task.completed}/{task.total}"), TextColumn("{task.fields[line]}")
            # refreshed by `show`, not by a thread that would take time from the training
            self.bar = Bar(
                step, BarColumn(bar_width=None), numbers, console=self.console, auto_refresh=False, expand=True
            )
            self.task = self.bar.add_task("", total=steps, completed=first_step, line="")

    def __enter__(self):
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self._refresh()
            self.bar.stop()

    def show(self, event):
        """Take one event of `Training.run`."""
        now = time.monotonic()
        if self.bar is None and event.kind == "step" and now - self.last_line > 10:
            self._print(self.line())  # of the step before this one: had it been validated, its line would be there
        if event.kind == "step":
            self.step = event.step
            self.losses.add(event.loss)
            self.rates.add(event.wall_us / event.tokens)
        elif event.kind == "eval":
            self.validation, self.accuracy = event.loss, event.accuracy
            self._print(self.line())
        elif event.kind == "notice":
            self._print(f"note: {event.text} (step {event.step})")
        elif event.kind == "sample":
            self._print(indented(printable(event.text), self.console.width if self.bar is not None else None))
        if self.bar is not None and now - self.last_line > 0.1:
            self._refresh()
            self.last_line = now

    def line(self):
        return f"step {self.step:>{len(str(self.steps))}}/{self.steps}  {self._numbers()}"

    def summary(self, steps):
        numbers = [f"smoothed {self.losses.mean():.3f}"] if self.losses.count else []
        numbers += [f"validation {self.validation:.3f}"] if self.validation is not None else []
        right = f", {100 * self.accuracy:.1f} % right" if self.accuracy is not None else ""
        seconds = time.monotonic() - self.started
        done = f"done: {steps} steps in {clock(seconds)}"
        return f"{done}\n{'loss':<10}{', '.join(numbers)} nats per {self.unit}{right}" if numbers else done

    def _numbers(self, room=None):
        """room: columns there are for them, None = as many as they take. Where they are too few the speed is left out."""
        numbers = []
        if self.losses.count:
            numbers.append(f"smoothed loss {self.losses.mean():.3f}")
        if self.validation is not None:
            numbers.append(f"val {self.validation:.3f}")
        if self.accuracy is not None:
            numbers.append(f"{100 * self.accuracy:.1f} % right")
        if self.rates.count:
            seconds = (time.monotonic() - self.started) / (self.step - self.first_step)
            left = f"{clock(seconds * (self.steps - self.step))} left"
            speed = f"{compact(1e6 / self.rates.mean())} {_SHORT.get(self.unit, self.unit)}/s"
            whole = "  ".join([*numbers, speed, left])
            numbers += [speed, left] if room is None or len(whole) <= room else [left]
        return "  ".join(numbers)

    def _print(self, text):
        self.console.print(text, markup=False, soft_wrap=True)
        if self.bar is None:
            self.last_line = time.monotonic()
            self.console.file.flush()

    def _refresh(self):
        if self.bar is not None:
            room = self.console.width - len(f"step {self.step}/{self.steps} {'':{_NARROWEST_BAR}} ")
            self.bar.update(self.task, completed=self.step, line=self._numbers(room))
            self.bar.refresh()


_NARROWEST_BAR = 6  # columns
_SHORT = {"token": "tok", "image": "img"}


class Recent:
    """The mean of the last numbers, older ones fading away."""

    def __init__(self, span=30):
        self.keep = 1 - 1 / span
        self.total = self.weight = 0.0
        self.count = 0

    def add(self, value):
        self.total = self.keep * self.total + value
        self.weight = self.keep * self.weight + 1
        self.count += 1

    def mean(self):
        return self.total / self.weight


def clock(seconds):
    """75 -> "1:15", 7200 -> "2:00:00"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def compact(number):
    """45210 -> "45.2k"."""
    for limit, suffix in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def printable(text):
    """`text` without characters that would steer the terminal."""
    steering = ("Cc", "Cf", "Cs")  # control, format (writing direction), surrogate
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in steering and c not in "\n\t" else c
        for c in text.replace("\r\n", "\n")
    )


def indented(text, width=None, indent="    | "):
    """`text` with `indent` before every line; lines are cut at `width` when there is one."""
    lines, room = text.split("\n"), (width or 0) - len(indent)
    if room > 0:
        lines = [line[i : i + room] for line in lines for i in range(0, max(1, len(line)), room)]
    return "\n".join(indent + line for line in lines)
