"""Puts the stand-in into every Python that is started with this folder on its path."""

import stand_in_kernels

stand_in_kernels.install()
