"""The whole job on real input: `melora-fx demo`.

data    the demo's own labelled texts and model, from pip packages
report  what the demo prints of its results
demo    `run_demo`: a training with the defaults of `melora-fx train`, then export, fold, time, report
"""
