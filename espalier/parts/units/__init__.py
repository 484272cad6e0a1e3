"""Units that there are: what they are worth, which go, what follows."""
