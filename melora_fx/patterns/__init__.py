"""The linear nodes of an FX graph: how each form of a linear is recognised."""
