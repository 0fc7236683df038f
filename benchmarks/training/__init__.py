"""What a training step costs: parts of train_step, processes and experts.

step_cost      a step, the memory saved for its backward pass, and its peak memory
train_cells    the cells of train_step
train_sides    a model, and the ways to train it
train_report   the table and the picture of train_step
spread         ways to spread a model over processes
traffic        what a process sends and receives
processes_cell a case of processes, as a program
scale_model    costs on several GPUs, calculated on paper
"""
