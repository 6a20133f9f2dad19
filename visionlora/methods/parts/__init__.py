"""What several methods share: decompositions, rotations, gates, caches, routing."""
