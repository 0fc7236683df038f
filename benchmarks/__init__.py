"""What the code costs beside what it is chosen against: `python -m benchmarks` in the repository's root lists them.

Here, one file for each benchmark, with a function `run(options)` that gives an exit status, most by `run_cases`:

glue_study, language_study      does MELoRA learn as well as LoRA
end_to_end                      from a base model to a served graph
train_step, processes, experts  a training step
rewrite_speed, site_speed, swap_speed, fold_speed, fold_rounding      rewriting, sites, swaps and folds
latency, peers, decoding, generation, adapter_forms      exported graphs
__main__       the list of them, and the command line
report_rows    rows of what `melora-fx demo`, `melora-fx train` and an example reported

common/        what several of them share
studies/       parts of the two studies
training/      parts of what measures a training step
deployment/    parts of what measures folds and graphs
gpu/           what is run on a machine with a GPU
pages/         the figures of README.md and docs/, made of the CSV files in results/
"""
