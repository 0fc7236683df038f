"""The cells of train_step: one factor at a time around a centre, for each model and mode."""

from dataclasses import dataclass, replace

from .train_sides import FEW_SIDES, ON_A_CPU, SEQUENCE, Setting

_CENTRES = (
    ("MiniLM-L6", "eager", 1024),
    ("MiniLM-L6", "compiled", 1024),
    ("Tiny", "eager", SEQUENCE["Tiny"]),
    ("SmolLM2-135M", "eager", 256),
    ("Llama", "eager", 512),
    ("Llama", "compiled", 512),
    ("SmolLM2-135M", "compiled", 256),
)


@dataclass(frozen=True)
class Cell:
    """A setting, how it is run, and the sides that are compared."""

    setting: Setting
    mode: str = "eager"
    threads: int = 1
    tokens: int = 1024
    sides: tuple[str, ...] = ON_A_CPU
    keeps_memory: bool = False

    @property
    def key(self) -> str:
        """The name of the cell in the CSV file."""
        where = self.setting
        extra = f", dropout {where.dropout}" if where.dropout else ""
        extra += ", memory kept" if self.keeps_memory else ""
        return (
            f"{where.model}, {self.mode}, {where.targets}, rank {where.rank}, {where.dtype}, {self.threads} threads, "
            f"{self.tokens} tokens{extra}"
        )


def all_cells(llama: tuple[int, int, int, int]) -> list[Cell]:
    """Returns the cells in the order in which they are measured."""
    cells = []
    for model, mode, tokens in _CENTRES:
        setting = Setting(model, "all-linear" if model == "Tiny" else "centre", 8, "float32", llama=llama)
        centre = Cell(setting, mode, tokens=tokens, sides=ON_A_CPU if mode == "eager" else FEW_SIDES)
        cells += [centre, *(() if model == "Tiny" else _variations(centre))]
    return cells


def quick_cells() -> list[Cell]:
    """Returns a tiny model with all sides, and one compiled layer with two sides."""
    tiny = Setting("Tiny", "all-linear", 8, "float32")
    layer = Setting("Llama", "centre", 8, "float32", llama=(64, 128, 1, 4))
    return [
        Cell(tiny, tokens=SEQUENCE["Tiny"]),
        Cell(layer, "compiled", tokens=SEQUENCE["Llama"], sides=FEW_SIDES[:2]),
    ]


def _variations(centre: Cell) -> list[Cell]:
    """Returns the cells one change away from `centre`; few compiled ones, since a side compiles for up to a minute."""
    setting = centre.setting
    is_minilm = setting.model == "MiniLM-L6"
    is_eager = centre.mode == "eager"
    few = replace(centre, sides=FEW_SIDES)
    some = replace(centre, sides=(*FEW_SIDES, "authors' loop") if is_minilm and is_eager else FEW_SIDES)
    cells = [replace(some, setting=replace(setting, dtype="bfloat16"))]
    if is_eager or is_minilm:
        cells += [replace(some, setting=replace(setting, targets="q,v"))]
        cells += [replace(some, setting=replace(setting, rank=1)), replace(some, threads=2)]
    if is_eager:
        cells += [replace(some, setting=replace(setting, dropout=0.1))]
    if not is_minilm:  # MiniLM's centre is every linear
        cells += [replace(some, setting=replace(setting, targets="all-linear"))]
    else:
        cells += [replace(some, keeps_memory=True)]
        cells += [replace(few, tokens=tokens) for tokens in (256, 4096)]
        cells += [replace(few, tokens=8192)] if is_eager else []
    return cells
