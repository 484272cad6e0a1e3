"""Edits: plans, surgery on tensors and optimizer state, verification and the journal that undoes them."""
