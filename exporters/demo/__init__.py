"""The whole job on real input: `melora-fx demo`.

data      the demo's own labelled texts, from a pip package
base      the pretrained classifier and its tokenizer
batches   tokenised batches of the texts, and the logits of a runner on them
training  a training loop: adapters and head, AdamW, linear decay
report    what the demo prints
demo      `run_demo`: data, base, rewrite, train, export, fold, time, report
"""
