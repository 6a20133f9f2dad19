"""Trackers: what one is (`base`), LoRAT (`lorat`), baselines without training, and all by name.

| name | file | what it does |
|---|---|---|
| `lorat-*`, `tiny` | `lorat.py` | the one-stream transformer of `tasks/tracking/model` |
| `static` | `static.py` | never moves |
| `ncc` | `correlation.py` | normalised cross-correlation of grey pixels |
| `lite0` | `features.py` | correlation of the features of a frozen EfficientNet-lite0 |
"""
