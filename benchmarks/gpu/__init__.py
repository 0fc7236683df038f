"""What must be known from a machine with a GPU, behind one command: `python -m benchmarks gpu`.

Here, from the command down to what it measures:

options      the command's arguments
schedule     the parts one after another, each in its share of the minutes and in processes of its own
parts        the list of the parts, and what each of them needs
worker       one part in such a process
recorder     what that process is told, and how it writes down what it finds
rows         results as JSON lines: one file a part, one line a case
origin       device, driver, versions and commit of a line
cells        cases that measure something, one after another
graphs       whether graphs can be made and run here
correct      part: the tests that need a CUDA device
sessions     part: graphs on ONNX Runtime's CUDA and TensorRT beside torch
train        part: training steps over the frozen model's
latency      part: inference in every form
fold         part: folds in memory
report       tables and pictures of what came back
"""
