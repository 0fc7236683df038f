"""Measurements that need a machine with a GPU, behind one command: `python -m benchmarks gpu`.

From the command down to the measurements:

options      the command's arguments
schedule     runs the parts one after another, each in its share of the minutes and in its own processes
parts        the list of the parts, and what each of them needs
worker       runs one part in such a process
recorder     the settings of that process, and how it records its results
rows         results as JSON lines: one file per part
origin       device, driver, versions and commit of a line
cells        cases that measure something, one after another
graphs       whether graphs can be exported and run here
correct      part: the tests that need a CUDA device
sessions     part: graphs on ONNX Runtime's CUDA and TensorRT, compared with torch
train        part: training steps relative to the frozen model's
latency      part: inference in every form
fold         part: folds in memory
report       tables and pictures of the results
"""
