"""What is fastest on this machine: measured, kept, and chosen by ``precision="auto"``."""
