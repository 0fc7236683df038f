"""Training adapters on labelled texts: `melora-fx train`.

text_file        reads text files in the usual encodings
table_file       the text and label columns of a delimited file: delimiters, quotes, column names
split            chooses the texts that are held out of the training
texts            `read_texts`: a user's labelled texts, split into a training and a held-out part
tokenizer        the tokenizer of a model folder, and how many texts are cut
base             a pretrained classifier, and the names of its new parts
default_targets  the linears that are adapted by default
device           the device of a training
batches          tokenised batches of the texts, and the logits of a runner on them
checkpoints      the checkpoints that a killed run resumes from
report           the output of a training on the terminal
plots            `plot_training`: losses and accuracies of a training
loop             the training loop: AdamW, linear decay, evaluations
train            `run_train`: texts, base, targets, training, adapter, report
"""
