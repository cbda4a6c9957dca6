"""What everything stands on: nouns, files, the environment, a step on disk, and who does the work."""
