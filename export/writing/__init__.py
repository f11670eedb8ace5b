"""Everything that opens files for writing: graphs, weights, the manifest, the bundle's folder."""
