"""`melora-fx generate`: prints the text of an exported decoder as it is generated."""

from pathlib import Path
from typing import Annotated

import typer

from exporters.runtime.providers import PROVIDERS

_Folder = Annotated[Path, typer.Argument(help="Folder written by `export`, or the graph in it.")]
_Prompt = Annotated[str, typer.Argument(help="Text to continue.")]
_Adapter = Annotated[
    Path | None, typer.Option(help="Adapter folder or .onnx_adapter file, for a graph with swappable adapters.")
]
_Tokens = Annotated[int, typer.Option(help="Maximum number of new tokens.")]
_Sample = Annotated[bool, typer.Option("--sample", help="Draw tokens at random instead of taking the most likely one.")]
_Temperature = Annotated[float, typer.Option(help="With --sample: values below 1 make the text less surprising.")]
_TopP = Annotated[
    float, typer.Option(help="With --sample: draw from the fewest tokens that reach this total probability.")
]
_Seed = Annotated[int, typer.Option(help="With --sample: random seed.")]
_Provider = Annotated[
    str, typer.Option(help="ONNX Runtime provider: cpu or cuda.", autocompletion=lambda: [*PROVIDERS][:2])
]


def generate(
    folder: _Folder,
    prompt: _Prompt,
    adapter: _Adapter = None,
    max_new_tokens: _Tokens = 64,
    sample: _Sample = False,
    temperature: _Temperature = 1.0,
    top_p: _TopP = 1.0,
    seed: _Seed = 0,
    provider: _Provider = "cpu",
    threads: Annotated[int | None, typer.Option(help="Number of threads; default: ONNX Runtime's.")] = None,
) -> None:
    """Continue a prompt with an exported decoder, and print the new text."""
    from exporters.generation.generate import generate as generate_text

    generate_text(
        folder,
        prompt,
        adapter=adapter,
        max_new_tokens=max_new_tokens,
        sample=sample,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        on_text=lambda _, text: print(text, end="", flush=True),
        provider=provider,
        threads=threads,
    )
    print()
