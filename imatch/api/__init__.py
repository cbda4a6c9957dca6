"""The verbs in memory: nothing is written."""
