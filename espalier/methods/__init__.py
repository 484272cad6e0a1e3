"""The methods, one file each; `espalier.grow` and `espalier.prune` are their two namespaces."""
