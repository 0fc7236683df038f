"""The whole job on real input: `melora-fx demo`.

data.py      labelled texts, from a pip package or a user's CSV file
base.py      the pretrained classifier and its tokenizer
batches.py   tokenised batches of the texts, and the logits of a runner on them
training.py  a training loop: adapters and head, AdamW, linear decay
report.py    what the demo prints and plots
demo.py      `run_demo`: data, base, rewrite, train, export, fold, time, report
"""
