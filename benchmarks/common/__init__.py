"""Modules that several benchmarks share.

checkout       the checkout that is measured, and the exit statuses
needs          packages and weights that may be missing
cases          the columns, which cases are done, the CSV file, separate processes
kept           files that are made once and kept in --cache, and the results of separate processes
origin         sentences about when and on what rows were measured
ratios         times relative to a reference, for the CSV file and the picture
random_models  random models in the shapes of known ones
models         models, pretrained or random, with our adapters or PEFT's
stories        a text for decoders to learn from, and the training
"""
