"""From a frame to the model's square input and back.

```
crop.py     which part of the frame the model sees, its pixels, and the map between the two
jitter.py   the same part moved and stretched at random, for training
raster.py   which cells of a grid a box touches: template mask and positive cells
post.py     from score map and boxes to one box, and the box that is kept for the next frame
```

Boxes are continuous `x1, y1, x2, y2`; pixel 0 spans [0, 1).
"""
