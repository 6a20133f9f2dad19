"""The data sets of the few-shot CLIP literature, read as they lie on users' disks."""
