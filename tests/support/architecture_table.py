"""docs/ARCHITECTURES.md from measured properties:

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
    """The cells that must be the same on every machine."""
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
    """Model → those cells, as the file has them."""
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

Tiny random models, rewritten with "all-linear", rank {CONFIG.rank} and {CONFIG.num_blocks} blocks. Made by
`PYTHONPATH=tests python -m support.architecture_table > docs/ARCHITECTURES.md` with torch {_TORCH} and
transformers {transformers.__version__}; `tests/rewriting/test_architectures.py` checks every row against the code.

* *linear modules*: `nn.Linear` and `Conv1D` in the module tree, heads included; the sites leave out heads, and count
  weights that no module owns.
* *sites in place*, *whole*: found by each capture, under the same names. Where in place has fewer, PyTorch's
  attention gives its weights to one function; `rewrite` says so and names `example_inputs=`.
* *refused*: by the whole capture; `match` lists them with the reason, as it does what is no linear, such as
  the kernels of convolutions, which are not counted. A stack of expert matrices is one site.
* *start*: outputs after `rewrite` bit-equal to before, both captures (nn.TransformerEncoder, nn.MultiheadAttention:
  bit-equal in training; their fused path in evaluation rounds otherwise than their own layers: within 1e-5).
* *in effect*: sites, in place + whole, that change an output when their adapter alone is filled.
* *gradient error*: of the adapters against a dense float64 model with W + Δ, relative; nothing else has gradients.
* *fold error*: folded against unfolded in float32, relative. *restored*: keys and module types as before.
* *exports*: `torch.export` takes the rewritten model and computes the same. *graphs*: an ExportedProgram and an
  exported GraphModule of the model are rewritten with the same sites and bit-equal outputs.

`torch.compile(fullgraph=True)` over ten training steps of changing values compiles no more often than the unmodified
model: `aot_eager` for all, in both captures, `inductor` for {", ".join(n for n, e in ZOO.items() if e.inductor)}.

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
