"""What a training step costs: parts of train_step, processes and experts.

step_cost      a step: its time, what its backward keeps, its peak memory
train_cells    what train_step measures
train_sides    a model, and the ways to train it
train_report   its table and its picture
spread         ways to spread a model over processes
traffic        what a process sends and receives
processes_cell a case of processes, as a program
scale_model    a paper model of several GPUs
"""
