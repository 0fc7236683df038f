"""The whole workflow on real input: `melora-fx demo`.

data    the labelled texts and the model of the demo, from pip packages
report  prints the results of the demo
demo    `run_demo`: a training with the defaults of `melora-fx train`, then export, fold, time, report
"""
