"""Scores of tracking results in the field's conventions, result files, submissions and reports."""
