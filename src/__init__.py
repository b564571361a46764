"""Holdfast: a training template that cannot lose your run. Fork it, edit it, run ``train.py``."""
