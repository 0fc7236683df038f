"""Generates the figures of README.md and docs/ from the CSV files in results/: run `python -m benchmarks.pages`.

A page has them between two comments, `<!-- figures NAME: python -m benchmarks.pages -->` and `<!-- end -->`. A test
generates all of them again and compares.

__main__       the command
blocks         the list of blocks: page, name, CSV file, and the function that returns the lines
block          an entry of the list, and replacing the blocks of a page
words          parts of the sentences: machines, versions, ranges, durations
training       training steps, experts, swaps of adapters, rewriting
folding        folds
inference      exported graphs
overview       the three numbers of the README, and its picture
quality        what adapters learn, and the way from the base model to a served graph
commands       the reports of `melora-fx demo`, `melora-fx train` and an example
results        docs/RESULTS.md
spread         several processes, measured and calculated
"""
