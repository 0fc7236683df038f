"""One adapter in numbers: its names, shapes, initial values, and the update Δ that it makes."""
