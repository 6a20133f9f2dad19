"""A local page on which people adapt CLIP to their own classes: pictures in, an adapter out.

```
serve.py     settings, the server and its end
page.py      what is on the page, and what its buttons do
wording.py   what the page says about a result
session.py   one browser tab: its folder, its adapter, its cancel button
engine.py    adapt and predict, one at a time, on one frozen backbone
holdout.py   which pictures train and which test
pictures.py  pictures per class, from uploads or a zip file
```

Only `serve.py` and `page.py` know Gradio.
"""
