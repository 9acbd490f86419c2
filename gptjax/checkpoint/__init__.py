"""Run directories and other people's checkpoints.

Owns everything that is read from and written to a run directory, through orbax for arrays, and
the only key tables of foreign tensor names. Knows no generation and no training: a state is a
pytree with shapes, dtypes and shardings.
"""
