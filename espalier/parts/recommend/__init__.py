"""What a trained network's weights and activations say about which edits are likely to help."""
