"""The methods with a controller, and options that make every phase happen in a short run."""

STEPS = 24

METHODS = {
    "sora": ("sora", {"rank": 3, "xi": 0.02, "xi_max": 0.1, "stages": 3, "l1": 0.1}),
    "adalora": ("adalora", {"rank": 3, "target": 1.5, "interval": 3}),
    "increlora": ("increlora", {"target": 2.25, "top": 2, "watch": 2}),
    "increlora-frozen-reserve": ("increlora", {"target": 2.0, "top": 2, "advance": False}),
    "diffora": ("diffora", {"rank": 2, "search": 0.4}),
    "diffora-drop": ("diffora", {"rank": 2, "search": 0.4, "sharing": "drop"}),
    "spiel": ("spiel", {"density": 0.3, "every": 5, "observe": 3}),
    "spiel-sm3": ("spiel", {"density": 0.3, "every": 5, "observe": 3, "selection": "sm3"}),
}
