"""Pairs of degraded and clean pictures: found on disk, made from clean ones, cut into patches."""
