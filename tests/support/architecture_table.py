"""Measures the properties of every architecture and prints docs/ARCHITECTURES.md:

PYTHONPATH=tests python -m support.architecture_table > docs/ARCHITECTURES.md
"""

import math
import sys
import warnings
from pathlib import Path

import torch
import transformers

from support.heads import HEADING, section
from support.properties import CONFIG, Row, measure
from support.zoo import ZOO

TABLE = Path(__file__).parents[2] / "docs" / "ARCHITECTURES.md"
_TORCH = torch.__version__.split("+")[0]
_COLUMNS = (
    "model",
    "linear modules",
    "sites in place",
    "sites whole",
    "refused",
    "start",
    "in effect",
    "gradient error",
    "fold error",
    "restored",
    "exports",
    "graphs",
)


def counts_of(row: Row) -> tuple[str, ...]:
    """Returns the cells that must be the same on every machine."""
    return (
        str(row.modules),
        str(row.in_place),
        str(row.whole),
        str(row.refused),
        "equal" if row.starts_equal else "DIFFERS",
        f"{row.effective[0]} + {row.effective[1]}",
        "yes" if row.restored else "NO",
        "yes" if row.exports else "NO",
        "yes" if row.graphs else "NO",
    )


def documented() -> dict[str, tuple[str, ...]]:
    """Maps each model to those cells, as they are in the file."""
    page = TABLE.read_text().partition(HEADING)[0]
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| ")]
    cells = [[cell.strip().strip("`") for cell in row] for row in rows[1:]]
    return {name: (*rest[:6], *rest[8:]) for name, *rest in cells}


def _line(name: str, row: Row) -> str:
    counts = counts_of(row)
    cells = [f"`{name}`", *counts[:6], _magnitude(row.gradient_error), _magnitude(row.fold_error), *counts[6:]]
    return f"| {' | '.join(cells)} |"


def _magnitude(error: float) -> str:
    return "0" if error == 0 else f"≤ 1e{math.ceil(math.log10(error))}"


def main() -> None:
    print(f"""<!-- page: PYTHONPATH=tests python -m support.architecture_table > docs/ARCHITECTURES.md -->

# Architectures

Tiny random models, rewritten with "all-linear", rank {CONFIG.rank} and {CONFIG.num_blocks} blocks. This page is the
output of `PYTHONPATH=tests python -m support.architecture_table > docs/ARCHITECTURES.md` with torch {_TORCH} and
transformers {transformers.__version__}; `tests/rewriting/test_architectures.py` checks every row against the code.

* *linear modules*: the number of `nn.Linear` and `Conv1D` modules, heads included. Sites exclude heads, and include
  matrices that are not in such a module.
* *sites in place*, *sites whole*: the sites that each capture finds, under the same names. If there are fewer in place,
  PyTorch's attention passes its weights to one function; `rewrite` says so and names `example_inputs=`.
* *refused*: linears that the whole capture refuses; `match` lists them with the reason. It also lists weights that are
  not linears, such as the kernels of convolutions, which are not counted here. A stack of expert matrices is one site.
* *start*: outputs after `rewrite` are bit-equal to those before, in both captures. nn.TransformerEncoder and
  nn.MultiheadAttention are bit-equal in training; in eval mode their fused path rounds differently from their layers:
  within 1e-5.
* *in effect*: sites, in place + whole, that change an output if only their adapter is filled.
* *gradient error*: relative error of the adapters' gradients against a dense float64 model with W + Δ; nothing else has
  gradients.
* *fold error*: relative error of the folded against the unfolded model, in float32. *restored*: keys and module types
  are as before.
* *exports*: `torch.export` exports the rewritten model, and the program computes the same. *graphs*: an ExportedProgram
  and an exported GraphModule of the model are rewritten with the same sites and bit-equal outputs.

Over ten training steps with changing values, `torch.compile(fullgraph=True)` compiles a rewritten model no more often
than the plain one. Checked for all models in both captures with `aot_eager`, and in place with `inductor` for
{", ".join(n for n, e in ZOO.items() if e.inductor)}.

| {" | ".join(_COLUMNS)} |
|{"---|" * len(_COLUMNS)}""")
    for name in ZOO:
        print(_line(name, measure(name)))
        sys.stdout.flush()
    print(f"\n{section()}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    main()
