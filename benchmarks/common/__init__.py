"""What several benchmarks share.

checkout       the checkout that is measured, and the exit statuses
needs          packages and weights that may be missing
cases          the columns, which cases are done, the CSV file, processes of their own
kept           what is made once and kept in --cache, and what processes of their own have measured
origin         when and on what rows were made, in words
ratios         times over a reference's, in the CSV file and in the picture
random_models  models that are made at random, in the shapes of known ones
models         models, pretrained or random, with adapters of ours and of PEFT
stories        a text that decoders learn from, and the training
"""
