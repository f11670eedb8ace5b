"""Pages of text, tables and charts, questions to them, and a small model that finds one by the other."""
