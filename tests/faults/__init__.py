"""Faults injected into real runs, counted: `make faults`, and a sample of each in the tests."""
