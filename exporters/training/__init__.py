"""Training adapters on labelled texts.

text_file   a text file in any usual encoding
table_file  the text and label columns of a delimited file: delimiters, quotes, column names
split       which texts are held out of the training
texts       `read_texts`: a user's labelled texts, split into a training and a held-out part
plots       `plot_training`: losses and accuracies of a training
"""
