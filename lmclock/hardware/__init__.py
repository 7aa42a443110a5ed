"""What a machine could do at best: measured limits (calibrate.py), and device descriptions."""
