"""Visual object tracking: LoRAT on the shared low-rank core."""
