"""Pre-training with PROD, adaptation to a task, and the comparison of ways to adapt."""
