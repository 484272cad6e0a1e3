"""What trained and changed networks are handed on as, to places where Espalier is not installed."""
