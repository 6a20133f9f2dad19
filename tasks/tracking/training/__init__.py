"""Training of trackers on pairs of frames, as LoRAT does it.

pairs.py         which two frames                  photographs.py, paste.py, synthetic.py
augment.py       how their crops vary                              pairs without videos
samples.py       sample n as a function of n       batches.py      batch of a step, by workers
data.py          data sets by name                 objective.py    loss and IoU of a batch
optimizer.py     AdamW, its groups, its schedule   config.py, train.py   the command
"""
