"""The one-call road: a trained network made smaller until it meets a target, or larger without a change."""
