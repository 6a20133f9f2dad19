"""Tests of what tasks share."""
