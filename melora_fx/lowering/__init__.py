"""How an adapted linear is computed in training: the choice, the operators, and the pass over the graph."""
