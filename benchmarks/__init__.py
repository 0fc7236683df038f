"""What the code costs beside what it is chosen against: `python -m benchmarks` in the repository's root lists them.

Here, one file for each benchmark, with a function `run(options)` that gives its cases to `run_cases`:

glue_study, language_study, end_to_end, train_step, processes, experts, rewrite_speed, site_speed, swap_speed,
fold_speed, fold_rounding, latency, peers, decoding, generation, adapter_forms
               the benchmarks
__main__       the list of them, and the command line
needs          packages and weights that may be missing
cases          what is common: the columns, which cases are done, the CSV file, processes of their own
kept           what is made once and kept in --cache, and what processes of their own have measured
ratios         times over a reference's, in the CSV file and in the picture
origin         when and on what rows were made, in words
models         the models, pretrained or random, with adapters of ours and of PEFT
random_models  those that are made at random, in the shapes of known ones
checkout       the checkout that is measured, and the exit statuses
stories        a text that decoders learn from, and the training
step_cost      a training step: its time, what its backward keeps, its peak memory
train_cells, train_sides, train_report      parts of train_step
spread, traffic, processes_cell      parts of processes
scale_model    a paper model of several GPUs
report_rows    rows of what `melora-fx demo`, `melora-fx train` and an example reported
end_to_end_cells, end_to_end_graphs, end_to_end_process      parts of end_to_end
fold_sides     ways to merge an adapter into a folder
latency_cells, latency_report               parts of latency
peers_environment, peers_graphs, peers_process, peers_report      parts of peers
decoding_cells, decoding_graphs, decoding_process, decoding_report      parts of decoding

`studies/` holds the parts of glue_study and language_study. `gpu/` holds what is run on a machine with a GPU. `pages/`
makes the figures of README.md and docs/ of the CSV files.
"""
