"""The arithmetic that passes and statistics lean on, one operation a file."""
