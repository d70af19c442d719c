"""Meters, load scenarios and statistics: what turns a program into figures that can be believed."""
