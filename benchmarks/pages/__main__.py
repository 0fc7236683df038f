"""`python -m benchmarks.pages` generates every block of README.md and docs/ again, and the README's picture."""

from benchmarks.common.checkout import ROOT

from .block import lines_of, with_blocks
from .blocks import BLOCKS
from .overview import PICTURE, draw


def main() -> None:
    for page in dict.fromkeys(block.page for block in BLOCKS):
        path = ROOT / page
        made = {block.name: lines_of(block) for block in BLOCKS if block.page == page}
        path.write_text(with_blocks(path.read_text(), made))
        print(f"{page}: {', '.join(made)}")
    draw(ROOT / PICTURE)


if __name__ == "__main__":
    main()
