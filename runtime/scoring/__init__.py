"""How near vectors are to one another: single vectors, and late interaction of many.

Arithmetic on arrays; imports nothing of embedge but its errors.
"""
