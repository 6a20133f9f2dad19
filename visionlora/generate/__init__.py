"""Adapters made by a network instead of by training: ICM-LoRA."""

from visionlora.generate.canonical import aligned_pair, canonical_pair, canonical_tensors
from visionlora.generate.cvae import CVAE
from visionlora.generate.flatten import Layout, Statistics
from visionlora.generate.icm import Generator, GeneratorConfig, train_generator
from visionlora.generate.snapshots import SnapshotRecorder, TaskSnapshots, read_snapshots

__all__ = [
    "CVAE",
    "Generator",
    "GeneratorConfig",
    "Layout",
    "SnapshotRecorder",
    "Statistics",
    "TaskSnapshots",
    "aligned_pair",
    "canonical_pair",
    "canonical_tensors",
    "read_snapshots",
    "train_generator",
]
