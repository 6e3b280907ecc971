"""`python -m pipeline …`: make artifacts. Publishing them is `lingqu models publish`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar, cast, get_args

import typer
from pydantic import ValidationError

from pipeline.package import About, Precision
from services.inference.artifact import Lineage

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
Out = Annotated[
    Path, typer.Option("--out", help="Folder of artifacts; each gets a sub-folder named by digest.")
]
Evaluation = Annotated[
    list[str], typer.Option("--evaluation", metavar="NAME=VALUE", help="A figure; repeatable.")
]
Parent = Annotated[str, typer.Option(help="The version it was made from, as model/version, or a base model.")]
TrainingRun = Annotated[str, typer.Option(help="The run that made it.")]
DataSha256 = Annotated[str, typer.Option("--data-sha256", help="SHA-256 of the training data, in hex.")]
Source = Annotated[str, typer.Option(help="The code that made it, for example a commit.")]
Label = Annotated[list[str], typer.Option("--label", metavar="KEY=VALUE", help="Repeatable.")]
NONE: list[str] = []

T = TypeVar("T")


@app.command()
def bundle() -> None:
    """Make the artifacts of the bundled models, if they are not there yet."""
    from pipeline.bundled import bundled

    for item in bundled(typer.echo):
        typer.echo(f"{item.name}  {item.package.folder}")


@app.command()
def gguf(
    file: Path,
    out: Out = Path("artifacts"),
    precision: Annotated[
        str, typer.Option(help="Of the weights: fp16 (exact), int8 (half the memory), int4 (a third).")
    ] = "fp16",
    evaluation: Evaluation = NONE,
    parent: Parent = "",
    training_run: TrainingRun = "",
    data_sha256: DataSha256 = "",
    source: Source = "",
    label: Label = NONE,
) -> None:
    """Make an artifact of a text model in a GGUF file."""
    about = _about(evaluation, parent, training_run, data_sha256, source, label)
    if precision not in get_args(Precision):
        raise typer.BadParameter(f'--precision: "{precision}" is not one of {", ".join(get_args(Precision))}')
    from pipeline.decoder import package_gguf

    typer.echo(package_gguf(file, out, about, cast(Precision, precision)).folder)


@app.command()
def encoder(
    checkpoint: Path,
    out: Out = Path("artifacts"),
    evaluation: Evaluation = NONE,
    parent: Parent = "",
    training_run: TrainingRun = "",
    data_sha256: DataSha256 = "",
    source: Source = "",
    label: Label = NONE,
) -> None:
    """Make an artifact of a sentence encoder in the sentence-transformers layout."""
    about = _about(evaluation, parent, training_run, data_sha256, source, label)
    from pipeline.encoder import package_encoder

    typer.echo(package_encoder(checkpoint, out, about).folder)


@app.command()
def classifier(
    checkpoint: Path,
    out: Out = Path("artifacts"),
    evaluation: Evaluation = NONE,
    parent: Parent = "",
    training_run: TrainingRun = "",
    data_sha256: DataSha256 = "",
    source: Source = "",
    label: Label = NONE,
) -> None:
    """Make an artifact of a sequence classification checkpoint of transformers."""
    about = _about(evaluation, parent, training_run, data_sha256, source, label)
    from pipeline.classifier import package_classifier

    typer.echo(package_classifier(checkpoint, out, about).folder)


@app.command()
def answerer(
    checkpoint: Path,
    out: Out = Path("artifacts"),
    no_answer: Annotated[
        bool, typer.Option("--no-answer", help="It was trained to say that there is no answer (SQuAD 2.0).")
    ] = False,
    evaluation: Evaluation = NONE,
    parent: Parent = "",
    training_run: TrainingRun = "",
    data_sha256: DataSha256 = "",
    source: Source = "",
    label: Label = NONE,
) -> None:
    """Make an artifact of an extractive question answering checkpoint of transformers."""
    about = _about(evaluation, parent, training_run, data_sha256, source, label)
    from pipeline.answerer import package_answerer

    typer.echo(package_answerer(checkpoint, out, about, no_answer).folder)


@app.command()
def tensor(
    folder: Path,
    out: Out = Path("artifacts"),
    evaluation: Evaluation = NONE,
    parent: Parent = "",
    training_run: TrainingRun = "",
    data_sha256: DataSha256 = "",
    source: Source = "",
    label: Label = NONE,
) -> None:
    """Make an artifact of a folder with config.pbtxt and model.py for Triton's Python backend."""
    about = _about(evaluation, parent, training_run, data_sha256, source, label)
    from pipeline.tensor import package_tensor

    typer.echo(package_tensor(folder, out, about).folder)


@app.command()
def tensorrt(
    checkpoint: Path,
    out: Out = Path("artifacts"),
    evaluation: Evaluation = NONE,
    parent: Parent = "",
    training_run: TrainingRun = "",
    data_sha256: DataSha256 = "",
    source: Source = "",
    label: Label = NONE,
) -> None:
    """Make an artifact of a sentence encoder for NVIDIA GPUs: fp16, built by TensorRT where it is loaded."""
    about = _about(evaluation, parent, training_run, data_sha256, source, label)
    from pipeline.half import package_half

    typer.echo(package_half(checkpoint, out, about).folder)


@app.command()
def checkpoint(
    folder: Path,
    out: Out = Path("artifacts"),
    evaluation: Evaluation = NONE,
    parent: Parent = "",
    training_run: TrainingRun = "",
    data_sha256: DataSha256 = "",
    source: Source = "",
    label: Label = NONE,
) -> None:
    """Make an artifact of a text model for NVIDIA GPUs: a Hugging Face checkpoint, served by TensorRT-LLM."""
    about = _about(evaluation, parent, training_run, data_sha256, source, label)
    from pipeline.checkpoint import package_checkpoint

    typer.echo(package_checkpoint(folder, out, about).folder)


def _about(
    evaluation: list[str], parent: str, training_run: str, data_sha256: str, source: str, label: list[str]
) -> About:
    """Raises typer.BadParameter before anything slow has begun."""
    try:
        lineage = Lineage(
            parent=parent, training_run=training_run, data_sha256=data_sha256.lower(), source=source
        )
        return About(
            evaluation=_pairs("--evaluation", evaluation, float),
            lineage=lineage,
            labels=_pairs("--label", label, str),
        )
    except ValidationError as err:
        problem = err.errors()[0]
        raise typer.BadParameter(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from err


def _pairs(option: str, given: list[str], kind: Callable[[str], T]) -> dict[str, T]:
    pairs = {}
    for item in given:
        name, equals, value = item.partition("=")
        try:
            pairs[name] = kind(value)
        except ValueError as err:
            raise typer.BadParameter(f'{option}: "{value}" is no number') from err
        if not name or not equals:
            raise typer.BadParameter(f'{option}: "{item}" is not NAME=VALUE')
    return pairs


if __name__ == "__main__":
    app()
