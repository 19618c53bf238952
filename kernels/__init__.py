"""What models are rewritten to: one file per op, always in the same four parts. Start reading with `rms_norm.py`.

Import an op from its file, `from fxopt.kernels.rms_norm import rms_norm`: a name here would hide the file of that name.
"""
