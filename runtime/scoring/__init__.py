"""How near vectors are to one another: single vectors, and late interaction of many."""
