"""Bytes on a disk, whoever they belong to."""
