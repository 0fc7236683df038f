"""The figures of README.md and docs/, made of the CSV files in results/: `python -m benchmarks.pages` writes them anew.

A page has them between two comments, `<!-- figures NAME: python -m benchmarks.pages -->` and `<!-- end -->`; a test
makes all of them again and compares.

__main__       the command
blocks         the list: page, name, CSV file, and the function that makes the lines
block          an entry of it, and a page with its blocks written anew
words          what their sentences are made of: machines, versions, ranges, durations
training       training steps, experts, swaps of adapters, rewriting
folding        folds
inference      exported graphs
quality        what adapters learn, and the way from the base model to a served graph
commands       what `melora-fx demo`, `melora-fx train` and an example reported
results        docs/RESULTS.md
spread         several processes, and the paper model
"""
