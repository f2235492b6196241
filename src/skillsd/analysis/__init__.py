"""Runs, trajectories and skills for reading."""
