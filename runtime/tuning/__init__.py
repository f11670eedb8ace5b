"""What is fastest on this machine: graphs prepacked for it, ways of running timed and kept, ``precision="auto"``.

Uses sessions and encode; neither knows of it.
"""
