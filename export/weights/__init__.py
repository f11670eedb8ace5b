"""The tensors of one task: the checkpoint's, merged with the adapter's, rotated where that helps.

``tensors.py`` says what a graph asks of them.
"""
