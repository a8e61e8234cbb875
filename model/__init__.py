"""From images to an artifact: the fractal network, its training, calibration, evaluation and export.

Needs torch. Must not know the server: the two meet only in the exported artifact.
"""
