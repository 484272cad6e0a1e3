"""The common benchmark: suites of tasks, methods, budgets and seeds, run, kept and compared (docs/benchmark.md)."""
