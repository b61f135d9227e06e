"""A run whose events go to an experiment tracker while it trains, beside the files that every run writes.

    python examples/events_to_tracker.py trackio [steps]       # pip install trackio: a dashboard on this machine
    python examples/events_to_tracker.py wandb [steps]         # pip install wandb
    python examples/events_to_tracker.py tensorboardX [steps]  # pip install tensorboardX; look with tensorboard --logdir runs

A tracker that is not here needs two functions: one that takes {name: number} and the step, and one for the end.
"""

import dataclasses
import importlib
import sys

from toy.files.runs import new_folder
from toy.training import FromScratchOptions, Training


def open_tracker(name, out, options):
    """-> log(values, step) and close() of the tracker of this name, for the run in the directory `out`."""
    module = importlib.import_module(name)
    if name == "tensorboardX":
        writer = module.SummaryWriter(f"{out}-{name}")
        return lambda values, step: [writer.add_scalar(key, value, step) for key, value in values.items()], writer.close
    module.init(project="toy", name=out.name, config=dataclasses.asdict(options))  # trackio has the functions of wandb
    return lambda values, step: module.log(values, step=step), module.finish


def track(name, options, out):
    log, close = open_tracker(name, out, options)
    try:
        for event in Training(options, out=out).run():
            if event.kind in ("step", "eval"):
                numbers = {
                    key: value for key, value in event.to_json().items() if isinstance(value, float) and key != "t"
                }
                log(
                    {f"{event.kind}/{key}": value for key, value in numbers.items()}, event.step
                )  # step/loss, eval/loss, ...
    finally:  # also when the training diverged
        close()


def main(name="trackio", steps="300"):
    out = new_folder("tracked")
    track(name, FromScratchOptions(steps=int(steps)), out)
    print(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
