"""embedge's own kernels in C (``native/``), and the checks a process makes before it uses them."""
