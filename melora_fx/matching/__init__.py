"""The dry run: which linears `targets` names, which of them can be adapted, and why not the others."""
