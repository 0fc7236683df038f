"""`melora-fx generate`: text from an exported decoder, as it is written."""

from pathlib import Path
from typing import Annotated

import typer

from exporters.runtime.providers import PROVIDERS

_Folder = Annotated[Path, typer.Argument(help="Folder that `export` has written, or the graph in it.")]
_Prompt = Annotated[str, typer.Argument(help="What the text begins with.")]
_Adapter = Annotated[
    Path | None, typer.Option(help="For a graph with swappable adapters: an adapter folder or .onnx_adapter file.")
]
_Tokens = Annotated[int, typer.Option(help="Tokens to write at most.")]
_Sample = Annotated[bool, typer.Option("--sample", help="Draw tokens at random; else the most likely ones.")]
_Temperature = Annotated[float, typer.Option(help="With --sample: below 1 for less surprising texts.")]
_TopP = Annotated[float, typer.Option(help="With --sample: the fewest tokens with this probability together.")]
_Seed = Annotated[int, typer.Option(help="With --sample: of the random numbers.")]
_Provider = Annotated[
    str, typer.Option(help="What runs the graph: cpu or cuda.", autocompletion=lambda: [*PROVIDERS][:2])
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
    threads: Annotated[int | None, typer.Option(help="Threads; default: ONNX Runtime's.")] = None,
) -> None:
    """Write the text that an exported decoder continues a prompt with."""
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
