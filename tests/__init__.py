"""Tests. Importing them switches on the checks of tensor shapes."""

from .shapes import check_shapes

check_shapes()
