"""Espalier in other trainers, loggers and model formats; each module needs the package that it is named for."""
