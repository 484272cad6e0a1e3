"""When a method acts and how far it goes: schedules, triggers, amounts, recovery."""
