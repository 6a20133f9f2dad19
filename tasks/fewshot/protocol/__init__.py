"""The tables of the few-shot CLIP literature: every method on every data set, in one command."""
