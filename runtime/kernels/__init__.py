"""embedge's own kernels in C (``native/``): found, tried before a process uses them, registered in sessions.

repack <- register <- self_check <- library, which is what other rooms ask.
"""
