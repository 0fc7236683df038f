"""Training adapters on labelled texts: `melora-fx train`.

text_file        a text file in any usual encoding
table_file       the text and label columns of a delimited file: delimiters, quotes, column names
split            which texts are held out of the training
texts            `read_texts`: a user's labelled texts, split into a training and a held-out part
tokenizer        a folder's tokenizer, and how many texts are cut
base             a pretrained classifier, and what is new in it
default_targets  which linears are adapted where the user names none
device           what a training runs on
batches          tokenised batches of the texts, and the logits of a runner on them
checkpoints      what a killed run goes on from
report           what a training prints
plots            `plot_training`: losses and accuracies of a training
loop             the training loop: AdamW, linear decay, evaluations
train            `run_train`: texts, base, targets, training, adapter, report
"""
