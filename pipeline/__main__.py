"""`python -m pipeline …`: make artifacts. Publishing them is `lingqu models publish`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
Out = Annotated[
    Path, typer.Option("--out", help="Folder of artifacts; each gets a sub-folder named by digest.")
]


@app.command()
def bundle() -> None:
    """Make the artifacts of the bundled models, if they are not there yet."""
    from pipeline.bundled import bundled

    for item in bundled(typer.echo):
        typer.echo(f"{item.name}  {item.package.folder}")


@app.command()
def gguf(file: Path, out: Out = Path("artifacts")) -> None:
    """Make an artifact of a text model in a GGUF file."""
    from pipeline.decoder import package_gguf

    typer.echo(package_gguf(file, out).folder)


@app.command()
def encoder(checkpoint: Path, out: Out = Path("artifacts")) -> None:
    """Make an artifact of a sentence encoder in the sentence-transformers layout."""
    from pipeline.encoder import package_encoder

    typer.echo(package_encoder(checkpoint, out).folder)


@app.command()
def tensor(folder: Path, out: Out = Path("artifacts")) -> None:
    """Make an artifact of a folder with config.pbtxt and model.py for Triton's Python backend."""
    from pipeline.tensor import package_tensor

    typer.echo(package_tensor(folder, out).folder)


if __name__ == "__main__":
    app()
