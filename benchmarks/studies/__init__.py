"""Studies of quality: the same training of several adapters, with several seeds, one process for each.

runs           what is trained: arms, runs, and the CSV file that grows by each
training       one training, of either library's adapter
glue           a process that trains MiniLM-L6 on one task of GLUE
language       a process that trains SmolLM2-135M on text
texts          the text, and its windows of tokens
intervals      means over seeds with 95 % intervals, and of differences by seed
comparisons    what is compared: the rows of a study, the values of its arms, and their differences
report         the tables, and what the intervals allow to say
picture        the picture
"""
