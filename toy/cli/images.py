"""The commands for image models: toy predict. (toy eval takes one as well.)"""

from pathlib import Path

import click

from toy.cli.base import BACKEND, CHECKPOINT, MODEL, Phase, as_json, command, tell_checkpoint

images = click.Group()


@command(images, "predict")
@MODEL
@click.argument("paths", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "json_wanted", is_flag=True, help="One JSON object an image, on stdout.")
@CHECKPOINT
@BACKEND
def predict(model, paths, json_wanted, checkpoint, backend, debug):
    """Say what is on images.

    MODEL is a run of toy train vit-tiny, or a checkpoint of one. For each IMAGE: the likeliest class, its probability, and
    the next two.
    """
    from toy.trained.classify import Classifier

    with Phase(2, debug):
        classifier = Classifier(model, backend, checkpoint)
        found = classifier.predict(paths)
        tell_checkpoint(model, classifier.step, checkpoint)
    with Phase(1, debug):
        width = max(len(str(prediction.path)) for prediction in found)
        for prediction in found:
            if json_wanted:
                record = {"image": str(prediction.path), "class": prediction.name}
                as_json(record | {"probabilities": prediction.probabilities})
                continue
            likeliest = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:3]
            words = ", ".join(f"{name} {100 * share:.1f} %" for name, share in likeliest[1:])
            click.echo(f"{prediction.path!s:<{width}}  {likeliest[0][0]} {100 * likeliest[0][1]:.1f} %  ({words})")
