"""Everything that opens files for writing: graphs, weights, the manifest, the card, the bundle's folder.

The pipeline calls ``precision`` for each precision, inside a place that ``bundle`` opens.
"""
