"""What methods are made of: scores, selections, initialisers, schedules and budgets."""
