"""Data sets, models and tasks for the command line and the benchmarks; nothing in the core imports this package."""
