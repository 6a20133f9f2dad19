"""Sequences of frames with boxes, as the public benchmarks and own folders keep them.

```
sequence.py   Sequence (to evaluate on) and Track (to train on)
frames.py     the files of the frames: numbered ones, and those of a folder in order
text.py       boxes, flags and lists of names out of text files, with the line of a mistake
clean.py      what training keeps of an annotation
found.py      folders of sequences, and what a benchmark says when something is not there
lists/        the official lists, which the downloads lack or hide
<layout>.py   one file per layout on disk: lasot, got10k, trackingnet, tnl2k, uav123, otb, nfs,
              folder, and coco (objects of photographs, as tracks of one frame)
catalogue.py  BENCHMARKS, load_benchmark and load_training: all of it by name
```
"""
