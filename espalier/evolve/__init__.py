"""The Surgeon: training and search for a topology in one. Branches of a network are edited, trained and compared."""
