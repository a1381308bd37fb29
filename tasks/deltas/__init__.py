"""Changes that a published adapter makes to the weights of its base: found by shapes, computed as they are written."""
