"""Image restoration: a network pre-trained on mixed degradations, one small adapter per task."""
