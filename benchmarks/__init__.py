"""Measures what the code costs compared with its alternatives: `python -m benchmarks` in the repository root lists all.

Each benchmark is one file with a function `run(options)` that returns an exit status. Most of them call `run_cases`:

glue_study, language_study      does MELoRA learn as well as LoRA
end_to_end                      from a base model to a served graph
train_step, processes, experts  a training step
rewrite_speed, site_speed, swap_speed, fold_speed, fold_rounding      rewriting, sites, swaps and folds
latency, peers, decoding, generation, adapter_forms      exported graphs
__main__       the list of benchmarks, and the command line
report_rows    rows from the reports of `melora-fx demo`, `melora-fx train` and an example

common/        modules shared by several benchmarks
studies/       parts of the two studies
training/      parts of the benchmarks of a training step
deployment/    parts of the benchmarks of folds and graphs
gpu/           benchmarks for a machine with a GPU
pages/         the figures of README.md and docs/, generated from the CSV files in results/
"""
