"""Findings: statistics over the files of an outbox, and the pages that show them.

Reads published folders only: knows no daemon, no inbox and no device.
"""
