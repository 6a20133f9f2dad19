"""Task packages built on the shared low-rank core; no task imports another, all may `shared`."""
