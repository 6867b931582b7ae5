"""The commands of `initjax`: each asks the library one question and shows the answer to a person or to a machine.

No module here imports JAX, NumPy or a plotting package at its top, so that `--help` answers at once.
"""
