"""Studies of quality: the same training of several adapters, with several seeds, one process for each.

runs           arms and runs, and the CSV file, which gets a row after each run
training       one training, with our adapter or PEFT's
glue           a process that trains MiniLM-L6 on one task of GLUE
language       a process that trains SmolLM2-135M on text
texts          the text, and its windows of tokens
intervals      means over seeds and paired differences, with 95 % intervals
comparisons    the rows of a study, the values of its arms, and their differences
report         the tables, and the conclusions that the intervals support
picture        the picture
"""
