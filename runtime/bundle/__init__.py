"""The bundle's format: its files, its manifest, and what is checked before anything of it is used.

Depends on the standard library and numpy; the exporter writes by the rules that stand here.
"""
